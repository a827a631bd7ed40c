// What the fp32 kernel is made of: vectors of AVX2 or AVX-512 (as the compiler is told), GELU, transposition, tile products.
#pragma once

#include <immintrin.h>

#include <cstdint>

// -------------------------------------------------------------------------------------------------------------- vectors

#ifdef __AVX512F__
constexpr int LANES = 16;
using Vec = __m512;
inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline Vec load(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }        // a b + c
inline Vec fma_less(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }   // a b - c
inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
// x where `low` <= y, else zero
inline Vec keep_from(Vec x, Vec y, float low) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, all(low), _CMP_GE_OQ), x); }
inline Vec where_negative(Vec x, Vec negative, Vec other) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(0), _CMP_LT_OQ), other, negative);
}
// x 2^n, where n is the whole number in the lowest bits of `shifted`
inline Vec times_power(Vec x, Vec shifted) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}
inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {  // a0 b0 a1 b1 ...
    low = _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
    high = _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
#else
constexpr int LANES = 8;
using Vec = __m256;
inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline Vec load(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fma_less(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec absolute(Vec x) { return _mm256_andnot_ps(all(-0.0f), x); }
inline float sum(Vec x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Vec keep_from(Vec x, Vec y, float low) { return _mm256_and_ps(_mm256_cmp_ps(y, all(low), _CMP_GE_OQ), x); }
inline Vec where_negative(Vec x, Vec negative, Vec other) {
    return _mm256_blendv_ps(other, negative, _mm256_cmp_ps(x, all(0), _CMP_LT_OQ));
}
inline Vec times_power(Vec x, Vec shifted) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
    const Vec lows = _mm256_unpacklo_ps(a, b), highs = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(lows, highs, 0x20);
    high = _mm256_permute2f128_ps(lows, highs, 0x31);
}
#endif

// The LANES x LANES matrix `rows` is transposed in place: each round interleaves the first half of the rows with the second.
inline void transpose(Vec rows[LANES]) {
    for (int step = 1; step < LANES; step *= 2) {
        Vec next[LANES];
        for (int i = 0; i < LANES / 2; ++i) interleave(rows[i], rows[i + LANES / 2], next[2 * i], next[2 * i + 1]);
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

struct Gelu {
    Vec value, slope;
};

// Exact GELU x Phi(x) and its derivative Phi(x) + x phi(x), both to a few units in the last place, also far to the left,
// where Phi(x) = exp(-x^2 / 2) R(-x) would be lost as a difference from one. R is a polynomial in 1 / (1 + 0.35 |x|) (relative
// error 3.2e-8, fitted by iterated least squares); the exponential is the one in phi. Not-a-number stays so.
inline Gelu gelu(Vec x) {
    const Vec one = all(1.0f), size = absolute(x);
    // -x^2 / 2 = half + lost exactly; exp of it = 2^whole exp(part)
    const Vec minus_half = x * all(-0.5f), half = x * minus_half, lost = fma_less(x, minus_half, half);
    const Vec magic = all(12582912.0f);  // 1.5 2^23: adding it rounds to a whole number, which is then in the lowest bits
    const Vec shifted = fma(half, all(1.44269504f), magic), whole = shifted - magic;
    Vec part = fma(whole, all(-0.693145752f), half);
    part = fma(whole, all(-1.42860677e-6f), part) + lost;
    Vec power = all(1.3888889e-3f);
    power = fma(power, part, all(8.3333333e-3f));
    power = fma(power, part, all(4.1666667e-2f));
    power = fma(power, part, all(1.6666667e-1f));
    power = fma(power, part, all(0.5f));
    power = fma(power, part, one);
    power = fma(power, part, one);
    const Vec exponential = keep_from(times_power(power, shifted), half, -87.0f);
    const Vec t = one / fma(size, all(0.35f), one);
    Vec tail = all(-0.029145915f);
    tail = fma(tail, t, all(0.143971652f));
    tail = fma(tail, t, all(-0.255714208f));
    tail = fma(tail, t, all(0.159174189f));
    tail = fma(tail, t, all(-0.0231099036f));
    tail = fma(tail, t, all(0.105508052f));
    tail = fma(tail, t, all(0.119832851f));
    tail = fma(tail, t, all(0.139861867f));
    tail = fma(tail, t, all(0.139621407f));
    tail = tail * t * exponential;
    const Vec phi = where_negative(x, tail, one - tail);
    return {x * phi, fma(x, exponential * all(0.39894228f), phi)};
}

// -------------------------------------------------------------------------------------------------------- tile products

// A tile of results: up to MOST_ROWS rows by up to MOST_VECS vectors, all of it in registers.
#ifdef __AVX512F__
constexpr int MOST_ROWS = 12, MOST_VECS = 2;  // of 32 registers 24 hold results, of 16 below 12
#else
constexpr int MOST_ROWS = 6, MOST_VECS = 2;
#endif
constexpr int LEAST_ROWS = MOST_ROWS / 2;
constexpr int64_t CHUNK = 16;  // steps of what is contracted over; widths are multiples of it

// The size of the next block where `left` are left: `most`, but the last two are halves, so that none is small.
inline int64_t block_size(int64_t left, int64_t most) { return left >= 2 * most ? most : left > most ? (left + 1) / 2 : left; }

struct NoWork {
    void operator()(int64_t, int64_t) const {}
};

// c (rows, VECS * LANES) = a (rows, depth) times b (depth, VECS * LANES). Each value is one chain of additions in the order of
// `depth`, whatever the tile, so that results do not depend on how rows are divided. Rows of `a` up to ROWS are read, and only
// `rows` are written. `work(start of the chunk, step in it)` is called at every step, so that its loads and stores hide behind
// the multiplications; all at once, they would not.
template <int ROWS, int VECS, typename Work>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride,
                     int64_t rows, const Work& work) {
    Vec sums[ROWS][VECS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int vec = 0; vec < VECS; ++vec) sums[row][vec] = all(0);
    for (int64_t start = 0; start < depth; start += CHUNK) {
#pragma GCC unroll 4
        for (int64_t k = start; k < start + CHUNK; ++k) {
            work(start, k - start);
            Vec columns[VECS];
#pragma GCC unroll 4
            for (int vec = 0; vec < VECS; ++vec) columns[vec] = load(b + (k * VECS + vec) * LANES);
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; ++row) {
                const Vec value = all(a[row * a_stride + k]);
#pragma GCC unroll 4
                for (int vec = 0; vec < VECS; ++vec) sums[row][vec] = fma(value, columns[vec], sums[row][vec]);
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
        if (row < rows)
#pragma GCC unroll 4
            for (int vec = 0; vec < VECS; ++vec) store(c + row * c_stride + vec * LANES, sums[row][vec]);
}

// `multiply` for numbers of rows and vectors that are known when it runs.
template <int VECS = MOST_VECS, int ROWS = MOST_ROWS>
void multiply_any(int64_t rows, int64_t vecs, const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                  int64_t c_stride) {
    if constexpr (VECS > 1)
        if (vecs < VECS) return multiply_any<VECS - 1, ROWS>(rows, vecs, a, a_stride, b, depth, c, c_stride);
    if constexpr (ROWS > LEAST_ROWS)
        if (rows < ROWS) return multiply_any<VECS, ROWS - 1>(rows, vecs, a, a_stride, b, depth, c, c_stride);
    multiply<ROWS, VECS>(a, a_stride, b, depth, c, c_stride, rows, NoWork());
}
