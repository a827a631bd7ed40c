// What the kernels for AMX are made of: tile products, conversions between bf16 and fp32, GELU, transposition.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

constexpr int64_t TILE = 16;  // rows of a tile
constexpr int64_t STEP = 32;  // bf16 values in a row of a tile: what one tile product contracts over

// ---------------------------------------------------------------------------------------------------------------- tiles

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {  // while it lives, this thread's eight tile registers are 16 rows of 64 bytes
    Tiles() {
        TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// c[i][j] (16 x 16 fp32 each) = sum over `steps` of A tile i times B tile j. Tiles of A: 16 rows, `stride` values apart.
template <int A_TILES, int B_TILES>
inline void multiply(const bf16* a, int64_t stride, const bf16* b, int64_t b_stride, int64_t steps, float* c) {
    const bf16 *a1 = a + TILE * stride, *b1 = b + b_stride;
    const int64_t bytes = stride * sizeof(bf16);
    _tile_zero(0);
    if (B_TILES == 2) _tile_zero(1);
    if (A_TILES == 2) _tile_zero(2);
    if (A_TILES == 2 && B_TILES == 2) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, a + step * STEP, bytes);
        _tile_loadd(6, b + step * TILE * STEP, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (B_TILES == 2) {
            _tile_loadd(7, b1 + step * TILE * STEP, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (A_TILES == 2) {
            _tile_loadd(5, a1 + step * STEP, bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (A_TILES == 2 && B_TILES == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    if (B_TILES == 2) _tile_stored(1, c + 256, 64);
    if (A_TILES == 2) _tile_stored(2, c + 512, 64);
    if (A_TILES == 2 && B_TILES == 2) _tile_stored(3, c + 768, 64);
}

// -------------------------------------------------------------------------------------------------------------- vectors

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 widen(const bf16* x) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline float widen_one(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// 32 weights as bf16.
inline __m512i load_weights(const bf16* w) { return _mm512_loadu_si512(w); }
inline __m512i load_weights(const int8_t* w) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16))));
    return narrow(low, high);
}

// `values` weights as bf16: the weights themselves, or converted into `buffer`.
inline const bf16* as_bf16(const bf16* w, int64_t, bf16*) { return w; }
inline const bf16* as_bf16(const int8_t* w, int64_t values, bf16* buffer) {
    for (int64_t i = 0; i < values; i += STEP) _mm512_store_si512(buffer + i, load_weights(w + i));
    return buffer;
}

// Dwords (low[i], high[i]) as bf16, for i = 0..15.
inline __m512i narrow_in_pairs(__m512 low, __m512 high) {
    const __m512i halves = narrow(low, high);
    const __m512i lows = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
    const __m512i highs = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    return _mm512_or_si512(lows, _mm512_slli_epi32(highs, 16));
}

struct Gelu {
    __m512 value, slope;
};

// Exact GELU x Phi(x) and its derivative Phi(x) + x phi(x). Phi from Abramowitz and Stegun 7.1.26, off by less than 1e-7;
// the exponential it needs is the one in phi.
inline Gelu gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 size = _mm512_abs_ps(x);
    // exp(-x^2 / 2) = 2^(whole + part)
    const __m512 exponent = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.72134752f));
    const __m512 whole = _mm512_roundscale_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(exponent, whole);
    __m512 power = _mm512_set1_ps(1.3333558e-3f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.6181291e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.5504109e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.4022651e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.9314718e-1f));
    power = _mm512_fmadd_ps(power, part, one);
    const __m512 exponential = _mm512_scalef_ps(power, whole);
    // t = 1 / (1 + 0.3275911 |x| / sqrt(2)), one Newton step after the estimate
    const __m512 divisor = _mm512_fmadd_ps(size, _mm512_set1_ps(0.23164189f), one);
    __m512 t = _mm512_rcp14_ps(divisor);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(divisor, t, _mm512_set1_ps(2.0f)));
    __m512 tail = _mm512_set1_ps(0.5f * 1.061405429f);
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(0.5f * -1.453152027f));
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(0.5f * 1.421413741f));
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(0.5f * -0.284496736f));
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(0.5f * 0.254829592f));
    tail = _mm512_mul_ps(_mm512_mul_ps(tail, t), exponential);
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    const __m512 phi = _mm512_mask_sub_ps(tail, positive, one, tail);
    const __m512 density = _mm512_mul_ps(exponential, _mm512_set1_ps(0.39894228f));
    return {_mm512_mul_ps(x, phi), _mm512_fmadd_ps(x, density, phi)};
}

// The 16 x 16 matrix of dwords `rows` (each 16 dwords) is transposed in place.
inline void transpose(__m512i rows[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
        rows[4 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
        rows[12 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
    }
}
