// Frozen experts in fp32 on CPUs with AVX2 or AVX-512: y = gate * (W_up gelu(W_down x + b_down) + b_up) for every routed row,
// and the gradients of x and the gates. Nothing but h, the pre-activations, is kept.
//
// The weights are read as they are, row-major, and there is no second copy of the pool. They are fp32, or whole numbers in int8
// that become fp32 times a scale on the way. A tile of results is rows that are broadcast, value by value, times vectors of
// columns. So
//   forward   rows = weights, columns = tokens: H^T = W_down X^T, then Y^T = W_up A^T. Tokens are transposed once into panels
//             of up to MOST_VECS vectors; the tiles of H^T are panels again, as the second product wants them.
//   backward  rows = tokens, columns = weights: dA = dY W_up, then dX = dH W_down.
// Either way the weights go through a small buffer that stays in the L1 or L2 cache while all rows of the task pass: a block of
// their rows or a panel of their columns. There their distances are no powers of two, which caches cannot hold many of. While
// one is multiplied, the next is copied into the other half of the buffer, so that the wait for memory is hidden.
//
// A task is up to task_rows() rows of one expert; threads take tasks in turn. Rows are independent of each other, so results do
// not depend on tasks or threads. Sums over a token's experts are taken in the order of its slots.
//
// Names: D width, F expert hidden width, R routed rows sorted by expert, T tokens, K experts a token, n rows of a task. D and F
// are multiples of 16.

#include "simd.h"
#include "tasks.h"

#include <unistd.h>

#include <type_traits>

namespace {

constexpr int64_t APART = 16;  // values between rows in buffers, lest their distance be a power of two

// Most rows of a task: what passes by every block of weights, tokens or activations, takes half of the L2 cache.
int64_t task_rows(int64_t D, int64_t F) {
    const int64_t reported = sysconf(_SC_LEVEL2_CACHE_SIZE), cache = reported > 0 ? reported : 1 << 20;
    return std::clamp<int64_t>(cache / 2 / int64_t(std::max(D, F) * sizeof(float)) / 32 * 32, 32, 128);
}

thread_local Scratch task_scratch;    // of every thread: what a task works on
thread_local Scratch result_scratch;  // of the calling thread: results of all rows, before they are summed by token

// The weights of the shard, or of one expert of it.
template <typename Weight>
struct Weights {
    int64_t D, F;
    const Weight *down, *up;
    const float *b_down, *b_up;
    float scale_down, scale_up;
    Weights of(int64_t e) const {
        return {D, F, down + e * F * D, up + e * D * F, b_down + e * F, b_up + e * D, scale_down, scale_up};
    }
};

template <typename Weight>
struct Matrix {
    const Weight* values;
    int64_t rows, columns;
    float scale;
};

inline void copy(const float* from, float, float* to, int64_t values) {
    for (int64_t i = 0; i < values; i += LANES) store(to + i, load(from + i));
}
inline void copy(const int8_t* from, float scale, float* to, int64_t values) {
    for (int64_t i = 0; i < values; i += LANES) store(to + i, load(from + i) * all(scale));
}

// Side work of a product: copies the MOST_ROWS rows that begin at `from`, one at each step of a chunk, and asks for those behind
// them.
template <typename Weight>
struct CopyRows {
    const Weight* from;
    const Matrix<Weight>& matrix;
    float* to;
    void operator()(int64_t start, int64_t row) const {
        if (row >= MOST_ROWS) return;
        const Weight* source = from + row * matrix.columns + start;
        __builtin_prefetch(source + MOST_ROWS * matrix.columns);
        copy(source, matrix.scale, to + row * (matrix.columns + APART) + start, CHUNK);
    }
};

// The same for MOST_VECS vectors of columns, a row at each step. What it asks for is not far down, because lines whose distance
// is a power of two push each other out.
template <typename Weight>
struct CopyColumns {
    const Weight* from;
    const Matrix<Weight>& matrix;
    float* to;
    void operator()(int64_t start, int64_t step) const {
        constexpr int64_t WIDTH = MOST_VECS * LANES, AHEAD = 64;
        const Weight* source = from + (start + step) * matrix.columns;
        for (int64_t i = 0; i < WIDTH; i += 64 / sizeof(Weight))
            __builtin_prefetch(source + AHEAD * matrix.columns + i, 0, 2);
        copy(source, matrix.scale, to + (start + step) * WIDTH, WIDTH);
    }
};

// -------------------------------------------------------------------------------------------------------------- forward

// Panels of n tokens: vectors of LANES tokens each, up to MOST_VECS side by side.
struct Panels {
    int64_t n;
    int64_t vecs() const { return (n + LANES - 1) / LANES; }
    // use(first vector, number of vectors) of each panel
    template <typename Use>
    void each(const Use& use) const {
        int64_t size;
        for (int64_t vec = 0; vec < vecs(); vec += size) {
            size = block_size(vecs() - vec, MOST_VECS);
            use(vec, size);
        }
    }
};

// Rows of `source` by their tokens into panels (D, vectors of a panel, LANES); zeros beyond the n-th.
void pack_tokens(const float* source, const int64_t* tokens, Panels panels, int64_t D, float* packed) {
    panels.each([&](int64_t first, int64_t vecs) {
        for (int64_t vec = 0; vec < vecs; ++vec)
            for (int64_t d = 0; d < D; d += LANES) {
                Vec block[LANES];
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const int64_t row = (first + vec) * LANES + lane;
                    block[lane] = row < panels.n ? load(source + tokens[row] * D + d) : all(0);
                }
                transpose(block);
                for (int64_t i = 0; i < LANES; ++i)
                    store(packed + first * LANES * D + ((d + i) * vecs + vec) * LANES, block[i]);
            }
    });
}

// results (panels of matrix.rows) = matrix times `tokens` (panels of matrix.columns)
template <typename Weight>
void weights_by_tokens(const Matrix<Weight>& matrix, const float* tokens, Panels panels, float* results, float* buffer) {
    const int64_t M = matrix.rows, depth = matrix.columns, stride = depth + APART;
    float *block = buffer, *next = buffer + MOST_ROWS * stride;
    const auto copy_rows = [&](int64_t first, int64_t rows, float* to) {
        for (int64_t row = 0; row < rows; ++row)
            copy(matrix.values + (first + row) * depth, matrix.scale, to + row * stride, depth);
    };
    int64_t rows = block_size(M, MOST_ROWS);
    copy_rows(0, rows, block);
    for (int64_t first = 0; first < M;) {
        const int64_t after = first + rows, next_rows = block_size(M - after, MOST_ROWS);
        bool copied = next_rows == 0;
        panels.each([&](int64_t vec, int64_t vecs) {
            const float* b = tokens + vec * LANES * depth;
            float* c = results + vec * LANES * M + first * vecs * LANES;
            if (copied || vecs < MOST_VECS || rows < MOST_ROWS || next_rows < MOST_ROWS)
                return multiply_any(rows, vecs, block, stride, b, depth, c, vecs * LANES);
            const CopyRows<Weight> work{matrix.values + after * depth, matrix, next};
            multiply<MOST_ROWS, MOST_VECS>(block, stride, b, depth, c, vecs * LANES, rows, work);
            copied = true;
        });
        if (!copied) copy_rows(after, next_rows, next);
        std::swap(block, next);
        first = after;
        rows = next_rows;
    }
}

// Panels of W_down x become panels of gelu(h); h (n, F) is written if it is kept.
void activate(float* values, Panels panels, const float* bias, int64_t F, float* h) {
    panels.each([&](int64_t first, int64_t vecs) {
        for (int64_t vec = 0; vec < vecs; ++vec) {
            const int64_t row = (first + vec) * LANES, rows = std::min<int64_t>(LANES, panels.n - row);
            for (int64_t f = 0; f < F; f += LANES) {
                float* block = values + first * LANES * F + (f * vecs + vec) * LANES;
                Vec lanes[LANES];
                for (int64_t i = 0; i < LANES; ++i) {
                    lanes[i] = load(block + i * vecs * LANES) + all(bias[f + i]);
                    store(block + i * vecs * LANES, gelu(lanes[i]).value);
                }
                if (h == nullptr) continue;
                transpose(lanes);
                for (int64_t i = 0; i < rows; ++i) store(h + (row + i) * F + f, lanes[i]);
            }
        }
    });
}

// y (n, D) = gate * (panels of W_up a + bias)
void weigh(const float* values, Panels panels, const float* bias, const float* gates, int64_t D, float* y) {
    panels.each([&](int64_t first, int64_t vecs) {
        for (int64_t vec = 0; vec < vecs; ++vec) {
            const int64_t row = (first + vec) * LANES, rows = std::min<int64_t>(LANES, panels.n - row);
            for (int64_t d = 0; d < D; d += LANES) {
                const float* block = values + first * LANES * D + (d * vecs + vec) * LANES;
                Vec lanes[LANES];
                for (int64_t i = 0; i < LANES; ++i) lanes[i] = load(block + i * vecs * LANES);
                transpose(lanes);
                for (int64_t i = 0; i < rows; ++i)
                    store(y + (row + i) * D + d, all(gates[row + i]) * (lanes[i] + load(bias + d)));
            }
        }
    });
}

template <typename Weight>
void forward_task(const Task& task, const Weights<Weight>& w, const float* x, const float* gates, const int64_t* tokens,
                  float* h, float* y) {
    const int64_t D = w.D, F = w.F;
    const Panels panels{task.rows};
    const int64_t padded = panels.vecs() * LANES;
    float* packed = task_scratch.get<float>(padded * (D + F) + 2 * MOST_ROWS * (std::max(D, F) + APART));
    float* activations = packed + padded * D;
    float* buffer = activations + padded * F;

    pack_tokens(x, tokens + task.first, panels, D, packed);
    weights_by_tokens(Matrix<Weight>{w.down, F, D, w.scale_down}, packed, panels, activations, buffer);
    activate(activations, panels, w.b_down, F, h == nullptr ? nullptr : h + task.first * F);
    weights_by_tokens(Matrix<Weight>{w.up, D, F, w.scale_up}, activations, panels, packed, buffer);
    weigh(packed, panels, w.b_up, gates + task.first, D, y + task.first * D);
}

// ------------------------------------------------------------------------------------------------------------- backward

// results (n, matrix.columns) = `tokens` (n, matrix.rows) times matrix; rows of both lie `stride` and `results_stride` apart.
template <typename Weight>
void tokens_by_weights(const float* tokens, int64_t stride, int64_t n, const Matrix<Weight>& matrix, float* results,
                       int64_t results_stride, float* buffer) {
    const int64_t depth = matrix.rows, vectors = matrix.columns / LANES;
    float *panel = buffer, *next = buffer + depth * MOST_VECS * LANES;
    const auto copy_columns = [&](int64_t vec, int64_t vecs, float* to) {
        for (int64_t row = 0; row < depth; ++row)
            copy(matrix.values + row * matrix.columns + vec * LANES, matrix.scale, to + row * vecs * LANES, vecs * LANES);
    };
    int64_t vecs = block_size(vectors, MOST_VECS);
    copy_columns(0, vecs, panel);
    for (int64_t vec = 0; vec < vectors;) {
        const int64_t after = vec + vecs, next_vecs = block_size(vectors - after, MOST_VECS);
        bool copied = next_vecs == 0;
        int64_t rows;
        for (int64_t row = 0; row < n; row += rows) {
            rows = block_size(n - row, MOST_ROWS);
            const float* a = tokens + row * stride;
            float* c = results + row * results_stride + vec * LANES;
            if (copied || rows < MOST_ROWS || vecs < MOST_VECS || next_vecs < MOST_VECS) {
                multiply_any(rows, vecs, a, stride, panel, depth, c, results_stride);
                continue;
            }
            const CopyColumns<Weight> work{matrix.values + after * LANES, matrix, next};
            multiply<MOST_ROWS, MOST_VECS>(a, stride, panel, depth, c, results_stride, rows, work);
            copied = true;
        }
        if (!copied) copy_columns(after, next_vecs, next);
        std::swap(panel, next);
        vec = after;
        vecs = next_vecs;
    }
}

// One row of dL/d(activation) before the gate becomes dL/dh. Returns its part of the gate's gradient.
inline float through_gelu(float* row, const float* h, float gate, int64_t F) {
    Vec total = all(0);
    for (int64_t f = 0; f < F; f += LANES) {
        const Gelu active = gelu(load(h + f));
        const Vec grad = load(row + f);
        total = fma(grad, active.value, total);
        store(row + f, all(gate) * grad * active.slope);
    }
    return sum(total);
}

template <typename Weight>
void backward_task(const Task& task, const Weights<Weight>& w, const float* grad_y, const float* gates, const int64_t* tokens,
                   const float* h, float* grad_x, float* grad_gates) {
    const int64_t D = w.D, F = w.F, n = task.rows, stride_y = D + APART, stride_h = F + APART;
    // Products of few rows read up to LEAST_ROWS of them; what is computed of the others is dropped.
    const int64_t padded = n + LEAST_ROWS;
    float* rows_y = task_scratch.get<float>(padded * (stride_y + stride_h) + 2 * std::max(D, F) * MOST_VECS * LANES);
    float* rows_h = rows_y + padded * stride_y;
    float* buffer = rows_h + padded * stride_h;

    for (int64_t row = 0; row < n; ++row) {
        const float* source = grad_y + tokens[task.first + row] * D;
        Vec total = all(0);
        for (int64_t d = 0; d < D; d += LANES) {
            const Vec values = load(source + d);
            store(rows_y + row * stride_y + d, values);
            total = fma(values, load(w.b_up + d), total);
        }
        grad_gates[task.first + row] = sum(total);
    }
    tokens_by_weights(rows_y, stride_y, n, Matrix<Weight>{w.up, D, F, w.scale_up}, rows_h, stride_h, buffer);
    for (int64_t row = 0; row < n; ++row) {
        const int64_t r = task.first + row;
        grad_gates[r] += through_gelu(rows_h + row * stride_h, h + r * F, gates[r], F);
    }
    tokens_by_weights(rows_h, stride_h, n, Matrix<Weight>{w.down, F, D, w.scale_down}, grad_x + task.first * D, D, buffer);
}

// target[t] = sum of the rows row_of[t][0..K-1] of `source`; -1 is no row.
void combine(const float* source, const Rows& rows, int64_t D, float* target) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows.T; ++t)
        for (int64_t d = 0; d < D; d += LANES) {
            Vec total = all(0);
            for (int64_t k = 0; k < rows.K; ++k) {
                const int64_t row = rows.row_of[t * rows.K + k];
                if (row >= 0) total = total + load(source + row * D + d);
            }
            store(target + t * D + d, total);
        }
}

template <typename Weight>
void forward(const Weights<Weight>& w, const Rows& rows, const float* x, const float* gates, float* h, float* y) {
    const std::vector<Task> tasks = make_tasks(rows, task_rows(w.D, w.F), LANES);
    float* rows_y = result_scratch.get<float>(rows.R * w.D);
    if (h != nullptr) ask_huge_pages(h, rows.R * w.F * sizeof(float));
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i)
        forward_task(tasks[i], w.of(tasks[i].expert), x, gates, rows.tokens, h, rows_y);
    combine(rows_y, rows, w.D, y);
}

template <typename Weight>
void backward(const Weights<Weight>& w, const Rows& rows, const float* grad_y, const float* gates, const float* h,
              float* grad_x, float* grad_gates) {
    const std::vector<Task> tasks = make_tasks(rows, task_rows(w.D, w.F), LANES);
    float* rows_x = result_scratch.get<float>(rows.R * w.D);
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i)
        backward_task(tasks[i], w.of(tasks[i].expert), grad_y, gates, rows.tokens, h, rows_x, grad_gates);
    combine(rows_x, rows, w.D, grad_x);
}

}  // namespace

extern "C" {

// Weights (e, F, D) and (e, D, F) are int8 or fp32. h (R, F) may be null. y: (T, D).
void experts_forward(const Rows* rows, int64_t D, int64_t F, const void* w_down, const float* b_down, const void* w_up,
                     const float* b_up, float scale_down, float scale_up, int is_int8, const float* x, const float* gates,
                     float* h, float* y) {
    const auto run = [&](const auto* down, const auto* up) {
        forward(Weights<std::decay_t<decltype(*down)>>{D, F, down, up, b_down, b_up, scale_down, scale_up}, *rows, x, gates, h,
                y);
    };
    if (is_int8) run(static_cast<const int8_t*>(w_down), static_cast<const int8_t*>(w_up));
    else run(static_cast<const float*>(w_down), static_cast<const float*>(w_up));
}

// grad_x: (T, D); grad_gates: (R,).
void experts_backward(const Rows* rows, int64_t D, int64_t F, const void* w_down, const float* b_down, const void* w_up,
                      const float* b_up, float scale_down, float scale_up, int is_int8, const float* grad_y,
                      const float* gates, const float* h, float* grad_x, float* grad_gates) {
    const auto run = [&](const auto* down, const auto* up) {
        backward(Weights<std::decay_t<decltype(*down)>>{D, F, down, up, b_down, b_up, scale_down, scale_up}, *rows, grad_y,
                 gates, h, grad_x, grad_gates);
    };
    if (is_int8) run(static_cast<const int8_t*>(w_down), static_cast<const int8_t*>(w_up));
    else run(static_cast<const float*>(w_down), static_cast<const float*>(w_up));
}

// gelu and its derivative of n values, a multiple of 16; for tests.
void experts_gelu(const float* x, int64_t n, float* value, float* slope) {
    for (int64_t i = 0; i < n; i += LANES) {
        const Gelu result = gelu(load(x + i));
        store(value + i, result.value);
        store(slope + i, result.slope);
    }
}

}  // extern "C"
