// Vectors of LANES floats through the compiler's own vector types, for kernels that keep sums in registers.
//
// Everything here is static and lives in the namespace of one instruction set (BCOS_ISA), so that nothing compiled for
// a newer one can be picked by the linker for an older one. Storage is float or bfloat16 (as uint16_t).
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace bcos {
namespace BCOS_ISA {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define BCOS_LANES 16
#elif defined(__AVX2__)
#define BCOS_LANES 8
#else
#define BCOS_LANES 4
#endif
static constexpr int LANES = BCOS_LANES;

typedef float vfloat __attribute__((vector_size(BCOS_LANES * 4)));
typedef int32_t vint __attribute__((vector_size(BCOS_LANES * 4)));
typedef uint32_t vuint __attribute__((vector_size(BCOS_LANES * 4)));
typedef uint16_t vhalf __attribute__((vector_size(BCOS_LANES * 2)));
typedef uint8_t vbyte __attribute__((vector_size(BCOS_LANES)));

static inline vfloat broadcast(float value) { return value - vfloat{}; }

static inline vfloat widen(vhalf h) { return (vfloat)(__builtin_convertvector(h, vuint) << 16); }

// To bfloat16, round to nearest even; a NaN stays one (quiet).
static inline vhalf narrow(vfloat v) {
    const vuint bits = (vuint)v;
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vuint quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector(v != v ? quiet : rounded, vhalf);
}

static inline vfloat load(const float* p) {
    vfloat v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline vfloat load(const uint16_t* p) {
    vhalf h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h);
}
static inline void store(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
static inline void store(uint16_t* p, vfloat v) {
    const vhalf h = narrow(v);
    __builtin_memcpy(p, &h, sizeof h);
}

// The first n lanes only (n < LANES): channels that are not a multiple of LANES. The other lanes read as 0.
#if BCOS_LANES == 16
static inline __mmask16 first_bits(int n) { return (__mmask16)((1u << n) - 1u); }
// Half a vector goes without a mask: a load that follows a masked store of the same place waits for it.
static inline vfloat load_part(const float* p, int n) {
    if (n == 8) return (vfloat)_mm512_zextps256_ps512(_mm256_loadu_ps(p));
    return (vfloat)_mm512_maskz_loadu_ps(first_bits(n), p);
}
static inline vfloat load_part(const uint16_t* p, int n) {
    return widen((vhalf)_mm256_maskz_loadu_epi16(first_bits(n), p));
}
static inline void store_part(float* p, vfloat v, int n) {
    if (n == 8) return _mm256_storeu_ps(p, _mm512_castps512_ps256((__m512)v));
    _mm512_mask_storeu_ps(p, first_bits(n), (__m512)v);
}
static inline void store_part(uint16_t* p, vfloat v, int n) {
    _mm256_mask_storeu_epi16(p, first_bits(n), (__m256i)narrow(v));
}
#else
static inline vfloat load_part(const float* p, int n) {
    vfloat v = {};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
static inline vfloat load_part(const uint16_t* p, int n) {
    vhalf h = {};
    for (int i = 0; i < n; ++i) h[i] = p[i];
    return widen(h);
}
static inline void store_part(float* p, vfloat v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
}
static inline void store_part(uint16_t* p, vfloat v, int n) {
    const vhalf h = narrow(v);
    for (int i = 0; i < n; ++i) p[i] = h[i];
}
#endif

// The first n lanes of v, 0 in the others.
static inline vfloat first_lanes(vfloat v, int n) {
#if BCOS_LANES == 16
    return (vfloat)_mm512_maskz_mov_ps((__mmask16)((1u << n) - 1u), (__m512)v);
#else
    for (int i = n; i < LANES; ++i) v[i] = 0;
    return v;
#endif
}

// PART: n lanes; otherwise all of them.
template <bool PART, typename T>
static inline vfloat get(const T* p, int n) {
    if constexpr (PART) return load_part(p, n);
    return load(p);
}
template <bool PART, typename T>
static inline void put(T* p, vfloat v, int n) {
    if constexpr (PART) {
        store_part(p, v, n);
    } else {
        store(p, v);
    }
}

// What a value is once stored as T.
static inline vfloat rounded(vfloat v, const float*) { return v; }
static inline vfloat rounded(vfloat v, const uint16_t*) { return widen(narrow(v)); }

static inline vfloat magnitude(vfloat v) { return (vfloat)((vuint)v & 0x7fffffffu); }

static inline vfloat square_root(vfloat v) {
#if BCOS_LANES == 16
    return (vfloat)_mm512_sqrt_ps((__m512)v);
#elif BCOS_LANES == 8
    return (vfloat)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
    return (vfloat)_mm_sqrt_ps((__m128)v);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vfloat)vsqrtq_f32((float32x4_t)v);
#else
    for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

static inline float sum_lanes(vfloat v) {
#if BCOS_LANES == 16
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif BCOS_LANES == 8
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    const vfloat quarter = v;
#endif
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Bit i: lane i of a comparison's result is set.
static inline uint32_t to_bits(vint mask) {
#if BCOS_LANES == 16
    return (uint32_t)_mm512_movepi32_mask((__m512i)mask);
#elif BCOS_LANES == 8
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}
static inline vint from_bits(uint32_t bits) {
#if BCOS_LANES == 16
    return (vint)_mm512_movm_epi32((__mmask16)bits);
#else
    vint lane;
    for (int i = 0; i < LANES; ++i) lane[i] = 1 << i;
    return (((int32_t)bits - vint{}) & lane) != 0;
#endif
}

// LANES bits of a mask of one bit a channel, from channel c (a multiple of LANES) on; n channels are there.
static inline uint32_t mask_bits(const uint8_t* packed, int64_t c, int n) {
    if (LANES == 4) return (uint32_t)packed[c >> 3] >> (c & 4);
    uint32_t bits = packed[c >> 3];
    if (LANES == 16 && n > 8) bits |= (uint32_t)packed[(c >> 3) + 1] << 8;
    return bits;
}
static inline void put_mask_bits(uint8_t* packed, int64_t c, int n, uint32_t bits) {
    if (n < LANES) bits &= (1u << n) - 1u;
    if (LANES == 4 && (c & 4)) {
        packed[c >> 3] = (uint8_t)(packed[c >> 3] | bits << 4);
        return;
    }
    packed[c >> 3] = (uint8_t)bits;
    if (LANES == 16 && n > 8) packed[(c >> 3) + 1] = (uint8_t)(bits >> 8);
}

// e^v to about 2 units in the last place; infinity above 88.7, 0 below -87.3; NaN passes.
static inline vfloat exponential(vfloat v) {
    vfloat x = v > 88.f ? broadcast(88.f) : v;
    x = x < -87.f ? broadcast(-87.f) : x;
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
    const vfloat shifted = x * 1.44269504088896341f + 12582912.f;
    const vfloat whole = shifted - 12582912.f;
    const vfloat r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    const vfloat power = (vfloat)((((vuint)shifted - 0x4b400000u) + 127u) << 23);
    vfloat result = p * power;
    result = v > 88.72283f ? broadcast(__builtin_inff()) : result;
    return v < -87.f ? vfloat{} : result;
}

// The error function, to 5e-7: a rational function of v up to |v| = 4, where it is 1 to the last digit. One division, and
// no exponential, which GELU would spend most of its time on.
static inline vfloat error_function(vfloat v) {
    vfloat x = v > 4.f ? broadcast(4.f) : v;
    x = x < -4.f ? broadcast(-4.f) : x;
    const vfloat s = x * x;
    vfloat p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    vfloat q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * p / q;
}

}  // namespace BCOS_ISA
}  // namespace bcos
