// Vectors as wide as the instruction set a kernel file is compiled for (GCC and Clang vector extensions).
//
// BLIP3O_ISA is the namespace and BLIP3O_VECTOR_BYTES the width; both come from CMakeLists.txt.
#pragma once

#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "blip3o/op_arguments.h"

#define BLIP3O_INLINE inline __attribute__((always_inline))

namespace blip3o::cpu::BLIP3O_ISA {

constexpr int64_t kLanes = BLIP3O_VECTOR_BYTES / sizeof(float);
typedef float Vec __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint32_t VecBits __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef int32_t VecInt __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(BLIP3O_VECTOR_BYTES / 2)));

constexpr int64_t round_up(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

BLIP3O_INLINE Vec broadcast(float value) { return value - Vec{}; }

BLIP3O_INLINE Vec widen(HalfVec half) {
#if defined(__AVX512F__)
    return (Vec)((VecBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
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

BLIP3O_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

BLIP3O_INLINE void store(bf16* to, Vec value) {
    const HalfVec half = narrow(value);
    std::memcpy(to, &half, sizeof half);
}

// The first `count` lanes; the others load as zero and are not stored.
template <class T>
BLIP3O_INLINE Vec load(const T* from, int64_t count) {
    if (count == kLanes) return load(from);
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
BLIP3O_INLINE void store(T* to, Vec value, int64_t count) {
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

// The sum of the lanes, always added in the same order.
BLIP3O_INLINE float sum_lanes(Vec value) {
    float lanes[kLanes];
    store(lanes, value);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

BLIP3O_INLINE float max_lanes(Vec value) {
    float lanes[kLanes];
    store(lanes, value);
    float largest = lanes[0];
    for (int64_t i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

BLIP3O_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// e^x to about one unit in the last place: x = n log 2 + r, the Taylor series of e^r to r^7 (|r| < 0.35, so
// the next term is below 2^-27), times 2^n. Below -87 the result is 0, above 88 it stays at e^88; a NaN stays
// one.
BLIP3O_INLINE Vec exponential(Vec x) {
    constexpr float kLog2E = 1.44269504f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec clamped = x > 88.0f ? broadcast(88.0f) : x < -87.0f ? broadcast(-87.0f) : x;
    const Vec shifted = clamped * kLog2E + kRounder;
    const Vec n = shifted - kRounder;
    const Vec r = (clamped - n * kLog2High) - n * kLog2Low;
    Vec series = broadcast(1.0f / 5040);
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const VecInt power = (VecInt)shifted - (VecInt)broadcast(kRounder);
    const Vec result = (Vec)((VecInt)series + (power << 23));
    return x < -87.0f ? Vec{} : x == x ? result : x;
}

}  // namespace blip3o::cpu::BLIP3O_ISA
