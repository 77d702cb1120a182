// Vectors as wide as the instruction set a kernel file is compiled for (GCC and Clang vector extensions).
//
// BLIP3O_ISA is the namespace and BLIP3O_VECTOR_BYTES the width; both come from CMakeLists.txt.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "blip3o/tensor_view.h"

#define BLIP3O_INLINE inline __attribute__((always_inline))

namespace blip3o::cpu::BLIP3O_ISA {

constexpr int64_t kLanes = BLIP3O_VECTOR_BYTES / sizeof(float);
typedef float Vec __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint32_t VecBits __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef int32_t VecInt __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(BLIP3O_VECTOR_BYTES / 2)));
typedef int8_t ByteVec __attribute__((vector_size(BLIP3O_VECTOR_BYTES / 4)));

constexpr int64_t round_up(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

constexpr BLIP3O_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

BLIP3O_INLINE Vec broadcast(float value) { return value - Vec{}; }

BLIP3O_INLINE Vec widen(HalfVec half) {
#if defined(__AVX512F__)
    return (Vec)((VecBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
#elif defined(__AVX2__)  // GCC 12 makes six instructions of the conversion below
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
    return (Vec)(__builtin_convertvector(half, VecBits) << 16);
#endif
}

// Round to nearest even, as the hardware and torch do; a NaN stays one.
BLIP3O_INLINE HalfVec narrow(Vec value) {
    const VecBits bits = (VecBits)value;
    const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(value == value ? rounded : (bits >> 16) | 0x40, HalfVec);
}

BLIP3O_INLINE Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

BLIP3O_INLINE Vec load(const bf16* from) {
    HalfVec half;
    std::memcpy(&half, from, sizeof half);
    return widen(half);
}

// Every int8 is exact as a float.
BLIP3O_INLINE Vec load(const int8_t* from) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vec)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    ByteVec bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, VecInt), Vec);
#endif
}

BLIP3O_INLINE Vec load(const int32_t* from) {
    VecInt value;
    std::memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, Vec);
}

BLIP3O_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

BLIP3O_INLINE void store(bf16* to, Vec value) {
    const HalfVec half = narrow(value);
    std::memcpy(to, &half, sizeof half);
}

// Values that int8 holds.
BLIP3O_INLINE void store(int8_t* to, VecInt values) {
    const ByteVec bytes = __builtin_convertvector(values, ByteVec);
    std::memcpy(to, &bytes, sizeof bytes);
}

// The first `count` lanes; the others load as zero and are not stored.
template <class T>
BLIP3O_INLINE Vec load(const T* from, int64_t count) {
    if (count == kLanes) return load(from);
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T, class V>
BLIP3O_INLINE void store(T* to, V value, int64_t count) {
    if (count == kLanes) return store(to, value);
    T padded[kLanes];
    store(padded, value);
    std::memcpy(to, padded, count * sizeof(T));
}

// body(i, kLanes) for every full vector below `size`, then body(i, count) for the rest.
template <class Body>
BLIP3O_INLINE void for_each_vector(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
    if (i < size) body(i, size - i);
}

// A row as floats, padded with zeros to whole vectors.
template <class T>
BLIP3O_INLINE void widen_row(float* to, const T* from, int64_t size) {
    for_each_vector(size, [&](int64_t i, int64_t count) { store(to + i, load(from + i, count)); });
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BLIP3O_SHUFFLES
#endif
#endif

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

// Combines the lanes of a vector pairwise, halves first: always in the same order.
#if defined(BLIP3O_SHUFFLES)
template <class Combine>
BLIP3O_INLINE float reduce_lanes(Vec4 v, const Combine& combine) {
    v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2))[0];
}

template <class Combine>
BLIP3O_INLINE float reduce_lanes(Vec8 v, const Combine& combine) {
    return reduce_lanes(
        combine(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)),
        combine);
}

template <class Combine>
BLIP3O_INLINE float reduce_lanes(Vec16 v, const Combine& combine) {
    return reduce_lanes(combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                        combine);
}
#else
template <class Vector, class Combine>
BLIP3O_INLINE float reduce_lanes(Vector vector, const Combine& combine) {
    constexpr int kCount = sizeof(Vector) / sizeof(float);
    float lane[kCount];
    std::memcpy(lane, &vector, sizeof vector);
    for (int half = kCount / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] = combine(lane[i], lane[half + i]);
    }
    return lane[0];
}
#endif

BLIP3O_INLINE float sum_lanes(Vec value) {
    return reduce_lanes(value, [](auto a, auto b) { return a + b; });
}

BLIP3O_INLINE float max_lanes(Vec value) {
    return reduce_lanes(value, [](auto a, auto b) { return a > b ? a : b; });
}

// b where either is a NaN. Compilers make a comparison and a blend of the conditional under AVX-512.
BLIP3O_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

BLIP3O_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

// e^x of x brought within -87 and 88; a NaN stays one. x = n log 2 + r, and e^r = 1 + r + r^2 p(r) with the cubic
// p whose largest relative error over |r| < 0.347 is least, 2^-23. To that comes the rounding of n log 2, 2^-24 |x|
// without a fused multiply-add and a twentieth of it with one: for x < 0 that is nothing beside e^0.
BLIP3O_INLINE Vec bounded_exponential(Vec x) {
    constexpr float kLog2E = 1.44269504f, kLog2 = 0.693147181f;
    constexpr float kRounder = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds; 127: the exponent's bias
    const Vec bounded = minimum(broadcast(88.0f), maximum(broadcast(-87.0f), x));
    const Vec shifted = bounded * kLog2E + kRounder;
    const Vec r = bounded - (shifted - kRounder) * kLog2;
    Vec series = broadcast(8.31250288e-3f);
    series = series * r + 4.18903343e-2f;
    series = series * r + 0.166671157f;
    series = series * r + 0.499992311f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return series * (Vec)((VecInt)shifted << 23);
}

// e^x, exactly 0 below -87 and e^88 above 88; a NaN stays one.
BLIP3O_INLINE Vec exponential(Vec x) { return x < -87.0f ? Vec{} : bounded_exponential(x); }

// x / (1 + e^-x). Beyond the bounds e^-x vanishes beside 1, or x beside it, for |x| up to some 1e30.
BLIP3O_INLINE Vec silu(Vec x) { return x / (1.0f + bounded_exponential(-x)); }

}  // namespace blip3o::cpu::BLIP3O_ISA
