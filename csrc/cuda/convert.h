// Loads and stores of float and bfloat16 elements, several at a time, with arithmetic in float.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "blip3o/op_arguments.h"

namespace blip3o::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// kCount neighbouring elements, moved by one load or store of kCount * sizeof(T) bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
    T element[kCount];
};

// Elements that one 16-byte access moves.
template <class T>
constexpr int kWidestPack = 16 / sizeof(T);

// Whether every row starts at, and has a width of, a multiple of 16 bytes.
template <class T>
bool rows_allow_packs(const Rows& rows) {
    return rows.width % kWidestPack<T> == 0 && (rows.count <= 1 || rows.stride % kWidestPack<T> == 0) &&
           reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

}  // namespace blip3o::cuda
