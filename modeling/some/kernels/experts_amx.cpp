// Frozen experts on CPUs with AMX: y = gate * (W_up gelu(W_down x + b_down) + b_up) for every routed row, and the gradients
// of x and the gates. One pass over an expert's rows does everything between gathering a token and writing its result: biases,
// GELU, its derivative and the gates are applied to the accumulators, so nothing but h, the pre-activations, is kept.
//
// The weights are read as they are, row-major, and are never packed beforehand. They are bf16, or whole numbers in int8 that
// become bf16 on the way (exactly) and whose products are multiplied by a scale. A tile product C += A B wants the rows of
// A plain and those of B in pairs: B[k / 2][n][k % 2]. So
//   forward   A = weights, B = tokens: H^T = W_down X^T, then Y^T = W_up A^T. Each token is put in pairs once, and the rows
//             of H^T come out in the order in which the second product reads its pairs.
//   backward  A = tokens, B = weights: dA = dY W_up, then dX = dH W_down. Two rows of the weights interleave into pairs with
//             one shuffle; that permutes columns within 32, which the epilogues undo.
//
// A task is up to TASK_ROWS rows of one expert; threads take tasks in turn. Rows are independent of each other, so results do
// not depend on tasks or threads. Sums over a token's experts are taken in the order of its slots, in fp32.
//
// Names: D width, F expert hidden width, R routed rows sorted by expert, T tokens, K experts a token, n rows of a task,
// G groups of 16 rows. D and F are multiples of 32.

#include "amx.h"
#include "tasks.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <type_traits>

namespace {

constexpr int64_t TASK_ROWS = 256;  // so that a task's tokens and activations stay in the L2 cache

thread_local Scratch task_scratch;    // of every thread: what a task works on
thread_local Scratch result_scratch;  // of the calling thread: results of all rows, before they are summed by token

int64_t groups_of(const Task& task) { return (task.rows + TILE - 1) / TILE; }

// The weights of the shard, or of one expert of it.
template <typename Weight>
struct Weights {
    int64_t D, F;
    const Weight *down, *up;
    const bf16 *b_down, *b_up;
    float scale_down, scale_up;
    Weights of(int64_t e) const {
        return {D, F, down + e * F * D, up + e * D * F, b_down + e * F, b_up + e * D, scale_down, scale_up};
    }
};

// -------------------------------------------------------------------------------------------------------------- forward

// 16 rows of `source` by their tokens as pairs: tiles [D / 32][pair][row][2], zeros for rows from `rows` on.
void pack_tokens(const bf16* source, const int64_t* tokens, int64_t rows, int64_t D, bf16* packed) {
    for (int64_t d = 0; d < D; d += STEP) {
        __m512i block[16];
        for (int64_t row = 0; row < TILE; ++row)
            block[row] = row < rows ? _mm512_loadu_si512(source + tokens[row] * D + d) : _mm512_setzero_si512();
        transpose(block);
        for (int64_t pair = 0; pair < TILE; ++pair) _mm512_store_si512(packed + (d + pair * 2) * TILE, block[pair]);
    }
}

// c: 32 rows of W_down by 16 tokens. Writes their h (if kept) and gelu(h), the latter as a tile of pairs.
inline void activate(const float* c0, const float* c1, float scale, const bf16* bias, int64_t rows, int64_t F, bf16* h,
                     bf16* activations) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512i pairs[16];
    for (int64_t pair = 0; pair < TILE; ++pair) {
        const float* c = pair < 8 ? c0 + 32 * pair : c1 + 32 * (pair - 8);
        const __m512 low = _mm512_fmadd_ps(_mm512_load_ps(c), factor, _mm512_set1_ps(widen_one(bias[2 * pair])));
        const __m512 high = _mm512_fmadd_ps(_mm512_load_ps(c + 16), factor, _mm512_set1_ps(widen_one(bias[2 * pair + 1])));
        // The backward sees h rounded, so the forward uses it rounded too.
        pairs[pair] = narrow_in_pairs(low, high);
        const __m512 rounded_low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[pair], 16));
        const __m512 rounded_high =
            _mm512_castsi512_ps(_mm512_and_si512(pairs[pair], _mm512_set1_epi32(int(0xffff0000u))));
        const __m512i active = narrow_in_pairs(gelu(rounded_low).value, gelu(rounded_high).value);
        _mm512_store_si512(activations + pair * 2 * TILE, active);
    }
    if (h == nullptr) return;
    transpose(pairs);
    for (int64_t row = 0; row < rows; ++row) _mm512_storeu_si512(h + row * F, pairs[row]);
}

// c: 32 rows of W_up by 16 tokens. Writes gate * (c + bias) of each token.
inline void weigh(const float* c0, const float* c1, float scale, const bf16* bias, const float* gates, int64_t rows, int64_t D,
                  bf16* y) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        low[i] = _mm512_load_si512(c0 + 16 * i);
        high[i] = _mm512_load_si512(c1 + 16 * i);
    }
    transpose(low);
    transpose(high);
    const __m512 bias_low = widen(bias), bias_high = widen(bias + 16), factor = _mm512_set1_ps(scale);
    for (int64_t row = 0; row < rows; ++row) {
        const __m512 gate = _mm512_set1_ps(gates[row]);
        const __m512 y_low = _mm512_mul_ps(gate, _mm512_fmadd_ps(_mm512_castsi512_ps(low[row]), factor, bias_low));
        const __m512 y_high = _mm512_mul_ps(gate, _mm512_fmadd_ps(_mm512_castsi512_ps(high[row]), factor, bias_high));
        _mm512_storeu_si512(y + row * D, narrow(y_low, y_high));
    }
}

// 32 rows of weights times all groups of packed tokens; `use(group, tiles)` gets each group's products, 256 values of the first
// 16 rows at `tiles` and of the others at `tiles + 512`.
template <typename Use>
inline void weights_by_tokens(const bf16* weights, int64_t width, const bf16* tokens, int64_t groups, const Use& use) {
    alignas(64) float c[4 * 256];
    for (int64_t group = 0; group < groups; group += 2) {
        const bool both = group + 1 < groups;
        const bf16* b = tokens + group * TILE * width;
        if (both) multiply<2, 2>(weights, width, b, TILE * width, width / STEP, c);
        else multiply<2, 1>(weights, width, b, TILE * width, width / STEP, c);
        use(group, c);
        if (both) use(group + 1, c + 256);
    }
}

template <typename Weight>
void forward_task(const Task& task, const Weights<Weight>& w, const bf16* x, const float* gates, const int64_t* tokens,
                  bf16* h, bf16* y) {
    const int64_t D = w.D, F = w.F, groups = groups_of(task);
    bf16* packed = task_scratch.get<bf16>((TASK_ROWS + TILE) * (D + F) + std::max(D, F) * STEP);
    bf16* activations = packed + groups * TILE * D;
    bf16* buffer = activations + groups * TILE * F;
    const auto rows_of = [&](int64_t group) { return std::min(TILE, task.rows - group * TILE); };

    for (int64_t group = 0; group < groups; ++group)
        pack_tokens(x, tokens + task.first + group * TILE, rows_of(group), D, packed + group * TILE * D);
    for (int64_t f = 0; f < F; f += STEP) {
        const bf16* rows = as_bf16(w.down + f * D, STEP * D, buffer);
        weights_by_tokens(rows, D, packed, groups, [&](int64_t group, const float* tiles) {
            bf16* kept = h == nullptr ? nullptr : h + (task.first + group * TILE) * F + f;
            activate(tiles, tiles + 512, w.scale_down, w.b_down + f, rows_of(group), F, kept,
                     activations + group * TILE * F + f * TILE);
        });
    }
    for (int64_t d = 0; d < D; d += STEP) {
        const bf16* rows = as_bf16(w.up + d * F, STEP * F, buffer);
        weights_by_tokens(rows, F, activations, groups, [&](int64_t group, const float* tiles) {
            const int64_t first = task.first + group * TILE;
            weigh(tiles, tiles + 512, w.scale_up, w.b_up + d, gates + first, rows_of(group), D, y + first * D + d);
        });
    }
}

// ------------------------------------------------------------------------------------------------------------- backward

// Columns n..n+31 of `rows` rows as two tiles of pairs. Columns 8i..8i+3 go to the first tile, 8i+4..8i+7 to the second.
template <typename Weight>
void pack_weights(const Weight* weights, int64_t stride, int64_t rows, bf16* panel) {
    bf16* second = panel + rows * TILE;
    for (int64_t row = 0; row < rows; row += 2) {
        const __m512i even = load_weights(weights + row * stride);
        const __m512i odd = load_weights(weights + (row + 1) * stride);
        _mm512_store_si512(panel + row * TILE, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(second + row * TILE, _mm512_unpackhi_epi16(even, odd));
    }
}

// Bring a matrix into the cache. pack_weights reads it in columns of 64 bytes, which no hardware prefetches; read once in
// order, at full bandwidth, it is there when its columns are wanted.
template <typename Weight>
inline void touch(const Weight* matrix, int64_t values) {
    constexpr int64_t LINE = 64 / sizeof(Weight);
    __m512i seen = _mm512_setzero_si512();
    for (int64_t i = 0; i < values; i += LINE) seen = _mm512_or_si512(seen, _mm512_loadu_si512(matrix + i));
    __asm__ volatile("" : : "v"(seen));
}

// Blocks of four columns: natural order <-> first tile's, then second tile's.
inline __m512i split_columns(__m512i x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x); }
inline __m512i join_columns(__m512i x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x); }

// c: 16 rows by 32 columns of dL/d(activation) before the gate. Adds the gates' gradients and writes dL/dh.
inline void through_gelu(const float* c0, const float* c1, float scale, const bf16* h, const float* gates, int64_t rows,
                         int64_t F, float* gate_sums, bf16* grad_h) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t row = 0; row < rows; ++row) {
        const __m512i columns = split_columns(_mm512_loadu_si512(h + row * F));
        const Gelu low = gelu(widen(_mm512_castsi512_si256(columns)));
        const Gelu high = gelu(widen(_mm512_extracti64x4_epi64(columns, 1)));
        const __m512 grad_low = _mm512_mul_ps(_mm512_load_ps(c0 + 16 * row), factor);
        const __m512 grad_high = _mm512_mul_ps(_mm512_load_ps(c1 + 16 * row), factor);
        __m512 sum = _mm512_load_ps(gate_sums + 16 * row);
        sum = _mm512_fmadd_ps(grad_low, low.value, sum);
        _mm512_store_ps(gate_sums + 16 * row, _mm512_fmadd_ps(grad_high, high.value, sum));
        const __m512 gate = _mm512_set1_ps(gates[row]);
        const __m512 h_low = _mm512_mul_ps(_mm512_mul_ps(gate, grad_low), low.slope);
        const __m512 h_high = _mm512_mul_ps(_mm512_mul_ps(gate, grad_high), high.slope);
        _mm512_store_si512(grad_h + row * F, join_columns(narrow(h_low, h_high)));
    }
}

// All groups of token rows times a panel of 32 columns of weights; `use(group, tiles)` gets each group's products, 256 values of
// the panel's first tile at `tiles` and of its second at `tiles + 256`.
template <typename Use>
inline void tokens_by_weights(const bf16* tokens, int64_t width, const bf16* panel, int64_t groups, const Use& use) {
    alignas(64) float c[4 * 256];
    for (int64_t group = 0; group < groups; group += 2) {
        const bool both = group + 1 < groups;
        const bf16* a = tokens + group * TILE * width;
        if (both) multiply<2, 2>(a, width, panel, width * TILE, width / STEP, c);
        else multiply<1, 2>(a, width, panel, width * TILE, width / STEP, c);
        use(group, c);
        if (both) use(group + 1, c + 512);
    }
}

template <typename Weight>
void backward_task(const Task& task, const Weights<Weight>& w, const bf16* grad_y, const float* gates, const int64_t* tokens,
                   const bf16* h, bf16* grad_x, float* grad_gates) {
    const int64_t D = w.D, F = w.F, groups = groups_of(task), padded = groups * TILE;
    bf16* rows_y = task_scratch.get<bf16>((TASK_ROWS + TILE) * (D + F + 2 * TILE) + std::max(D, F) * STEP);
    bf16* rows_h = rows_y + padded * D;
    float* gate_sums = reinterpret_cast<float*>(rows_h + padded * F);
    bf16* panel = rows_h + padded * (F + 2 * TILE);
    const auto rows_of = [&](int64_t group) { return std::min(TILE, task.rows - group * TILE); };

    // What is beyond the task's rows enters products whose results are not used; it must only not be invalid numbers.
    memset(rows_y + task.rows * D, 0, (padded - task.rows) * D * sizeof(bf16));
    memset(rows_h + task.rows * F, 0, (padded - task.rows) * F * sizeof(bf16));
    for (int64_t row = 0; row < task.rows; ++row) {
        const bf16* source = grad_y + tokens[task.first + row] * D;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += STEP) {
            const __m512i values = _mm512_loadu_si512(source + d);
            _mm512_store_si512(rows_y + row * D + d, values);
            sum = _mm512_fmadd_ps(widen(_mm512_castsi512_si256(values)), widen(w.b_up + d), sum);
            sum = _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(values, 1)), widen(w.b_up + d + 16), sum);
        }
        _mm512_store_ps(gate_sums + row * 16, sum);
    }
    touch(w.up, D * F);
    for (int64_t f = 0; f < F; f += STEP) {
        pack_weights(w.up + f, F, D, panel);
        tokens_by_weights(rows_y, D, panel, groups, [&](int64_t group, const float* tiles) {
            const int64_t first = task.first + group * TILE;
            through_gelu(tiles, tiles + 256, w.scale_up, h + first * F + f, gates + first, rows_of(group), F,
                         gate_sums + group * TILE * 16, rows_h + group * TILE * F + f);
        });
    }
    for (int64_t row = 0; row < task.rows; ++row)
        grad_gates[task.first + row] = _mm512_reduce_add_ps(_mm512_load_ps(gate_sums + row * 16));
    touch(w.down, F * D);
    for (int64_t d = 0; d < D; d += STEP) {
        pack_weights(w.down + d, D, F, panel);
        tokens_by_weights(rows_h, F, panel, groups, [&](int64_t group, const float* tiles) {
            bf16* target = grad_x + (task.first + group * TILE) * D + d;
            const __m512 factor = _mm512_set1_ps(w.scale_down);
            for (int64_t row = 0; row < rows_of(group); ++row) {
                const __m512 low = _mm512_mul_ps(_mm512_load_ps(tiles + 16 * row), factor);
                const __m512 high = _mm512_mul_ps(_mm512_load_ps(tiles + 256 + 16 * row), factor);
                _mm512_storeu_si512(target + row * D, join_columns(narrow(low, high)));
            }
        });
    }
}

// target[t] = sum of the rows row_of[t][0..K-1] of `source`; -1 is no row.
template <typename Target>
void combine(const bf16* source, const int64_t* row_of, int64_t T, int64_t K, int64_t D, Target* target) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        for (int64_t d = 0; d < D; d += STEP) {
            __m512 low = _mm512_setzero_ps(), high = low;
            for (int64_t k = 0; k < K; ++k) {
                const int64_t row = row_of[t * K + k];
                if (row < 0) continue;
                const __m512i values = _mm512_loadu_si512(source + row * D + d);
                low = _mm512_add_ps(low, widen(_mm512_castsi512_si256(values)));
                high = _mm512_add_ps(high, widen(_mm512_extracti64x4_epi64(values, 1)));
            }
            if constexpr (sizeof(Target) == sizeof(float)) {
                _mm512_storeu_ps(target + t * D + d, low);
                _mm512_storeu_ps(target + t * D + d + 16, high);
            } else {
                _mm512_storeu_si512(target + t * D + d, narrow(low, high));
            }
        }
    }
}

void combine_to(const bf16* source, const int64_t* row_of, int64_t T, int64_t K, int64_t D, void* target, int is_fp32) {
    if (is_fp32) combine(source, row_of, T, K, D, static_cast<float*>(target));
    else combine(source, row_of, T, K, D, static_cast<bf16*>(target));
}

template <typename Weight>
void forward(const Weights<Weight>& w, const Rows& rows, const bf16* x, const float* gates, bf16* h, void* y, int is_fp32) {
    const std::vector<Task> tasks = make_tasks(rows, TASK_ROWS, TILE);
    bf16* rows_y = result_scratch.get<bf16>(rows.R * w.D);
#pragma omp parallel
    {
        const Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); ++i)
            forward_task(tasks[i], w.of(tasks[i].expert), x, gates, rows.tokens, h, rows_y);
    }
    combine_to(rows_y, rows.row_of, rows.T, rows.K, w.D, y, is_fp32);
}

template <typename Weight>
void backward(const Weights<Weight>& w, const Rows& rows, const bf16* grad_y, const float* gates, const bf16* h, void* grad_x,
              int is_fp32, float* grad_gates) {
    const std::vector<Task> tasks = make_tasks(rows, TASK_ROWS, TILE);
    bf16* rows_x = result_scratch.get<bf16>(rows.R * w.D);
#pragma omp parallel
    {
        const Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); ++i)
            backward_task(tasks[i], w.of(tasks[i].expert), grad_y, gates, rows.tokens, h, rows_x, grad_gates);
    }
    combine_to(rows_x, rows.row_of, rows.T, rows.K, w.D, grad_x, is_fp32);
}

}  // namespace

extern "C" {

// Asks the system to let this process use AMX; whether it does.
int experts_allowed() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Weights (e, F, D) and (e, D, F) are int8 or bf16. h (R, F) may be null. y: (T, D), fp32 or bf16.
void experts_forward(const Rows* rows, int64_t D, int64_t F, const void* w_down, const bf16* b_down, const void* w_up,
                     const bf16* b_up, float scale_down, float scale_up, int is_int8, const bf16* x, const float* gates,
                     bf16* h, void* y, int y_is_fp32) {
    const auto run = [&](const auto* down, const auto* up) {
        forward(Weights<std::decay_t<decltype(*down)>>{D, F, down, up, b_down, b_up, scale_down, scale_up}, *rows, x, gates, h,
                y, y_is_fp32);
    };
    if (is_int8) run(static_cast<const int8_t*>(w_down), static_cast<const int8_t*>(w_up));
    else run(static_cast<const bf16*>(w_down), static_cast<const bf16*>(w_up));
}

// grad_x: (T, D), fp32 or bf16; grad_gates: (R,).
void experts_backward(const Rows* rows, int64_t D, int64_t F, const void* w_down, const bf16* b_down, const void* w_up,
                      const bf16* b_up, float scale_down, float scale_up, int is_int8, const bf16* grad_y,
                      const float* gates, const bf16* h, void* grad_x, int grad_x_is_fp32, float* grad_gates) {
    const auto run = [&](const auto* down, const auto* up) {
        backward(Weights<std::decay_t<decltype(*down)>>{D, F, down, up, b_down, b_up, scale_down, scale_up}, *rows, grad_y,
                 gates, h, grad_x, grad_x_is_fp32, grad_gates);
    };
    if (is_int8) run(static_cast<const int8_t*>(w_down), static_cast<const int8_t*>(w_up));
    else run(static_cast<const bf16*>(w_down), static_cast<const bf16*>(w_up));
}

}  // extern "C"
