// Vectors of floats for the instruction set that this file is compiled for, on the compiler's vector extension: the
// same bodies become AVX2, AVX-512, NEON or plain code. Only what the extension cannot say is written per set.
//
// Everything is in an unnamed namespace: each isa_*.cpp has its own copy, and the linker cannot mix them up.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));

struct Bfloat16 {
    uint16_t bits;
};

inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline Vec load(const Bfloat16* p) {
    HalfVec half;
    __builtin_memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, UintVec) << 16);
}
// The bits of bfloat16 values, in the lower half of each lane. Rounds to the nearest, ties to even; a NaN stays one.
inline UintVec bfloat16_bits(Vec v) {
    const UintVec bits = (UintVec)v;
    const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UintVec quiet = (bits >> 16) | 0x40u;
    const UintVec is_nan = (UintVec)(v != v);
    return (rounded & ~is_nan) | (quiet & is_nan);
}
inline void store(Bfloat16* p, Vec v) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v));
#else
    const HalfVec half = __builtin_convertvector(bfloat16_bits(v), HalfVec);
#endif
    __builtin_memcpy(p, &half, sizeof half);
}

inline float load_one(const float* p) { return *p; }
inline void store_one(float* p, float value) { *p = value; }
inline float load_one(const Bfloat16* p) {
    const uint32_t bits = (uint32_t)p->bits << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline void store_one(Bfloat16* p, float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    p->bits = value != value ? (uint16_t)((bits >> 16) | 0x40u) : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct Float16 {
    uint16_t bits;
};
inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    HalfVec half;
    __builtin_memcpy(&half, p, sizeof half);
    const UintVec wide = __builtin_convertvector(half, UintVec), is_special = (UintVec)((wide & 0x7c00u) == 0x7c00u);
    // Shifted into float32's fields the exponent is 112 too small; the product is exact, for subnormal numbers too.
    const UintVec finite = (UintVec)((Vec)((wide & 0x7fffu) << 13) * 0x1p112f);
    const UintVec special = (wide & 0x3ffu) << 13 | 0x7f800000u;
    return (Vec)((finite & ~is_special) | (special & is_special) | (wide & 0x8000u) << 16);
#endif
}
inline float load_one(const Float16* p) {
#if defined(__F16C__)
    return _cvtsh_ss(p->bits);
#else
    Float16 some[kWidth] = {*p};
    return load(some)[0];
#endif
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < kWidth; i++) total += v[i];
    return total;
}
inline float largest(Vec v) {
    float value = v[0];
    for (int i = 1; i < kWidth; i++) value = v[i] > value ? v[i] : value;
    return value;
}

// e^x to about 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, then a polynomial (Cephes' expf) for e^r.
// Below -87.3 the result is 0, above 88 it is infinite; NaN stays NaN.
inline Vec exp(Vec x) {
    const Vec clamped = min(max(x, broadcast(-87.33654f)), broadcast(88.02969f));
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = fma(clamped, broadcast(1.44269504f), magic);
    const Vec n = shifted - magic;
    Vec r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    const IntVec exponent = ((IntVec)shifted - (IntVec)magic + 127) << 23;
    Vec value = p * (Vec)exponent;
    value = x < -87.33654f ? Vec{} : value;
    value = x > 88.02969f ? broadcast(__builtin_inff()) : value;
    return x != x ? x : value;
}
inline float exp_one(float x) { return exp(broadcast(x))[0]; }

}  // namespace
