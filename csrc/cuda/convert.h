// Loads and stores of float and bfloat16 elements, several at a time, with arithmetic in float.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "blip3o/tensor_view.h"

namespace blip3o::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(int8_t value) { return static_cast<float>(value); }

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

// kCount neighboring elements, moved by one load or store of kCount * sizeof(T) bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
    T element[kCount];
};

// Elements that one 16-byte access moves.
template <class T>
constexpr int kWidestPack = 16 / sizeof(T);

template <class T, int kCount>
__device__ inline Pack<T, kCount> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <class T, int kCount>
__device__ inline void store_pack(T* to, const Pack<T, kCount>& pack) {
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Two bfloat16 in a word, the first in its lower half.
__device__ inline float2 to_floats(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ inline uint32_t from_floats(float2 values) {
    const Pack<__nv_bfloat16, 2> pack = {
        {from_float<__nv_bfloat16>(values.x), from_float<__nv_bfloat16>(values.y)}};
    uint32_t word;
    memcpy(&word, &pack, sizeof word);
    return word;
}

// a b + c of the two bfloat16 of each word, rounded once.
__device__ inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
#else
    const float2 x = to_floats(a), y = to_floats(b), z = to_floats(c);
    return from_floats({fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y)});  // exact in float wherever it is used
#endif
}

// Two int8, in the lower bytes of the halves of a word whose upper ones are zero, as bfloat16. 128 + (v mod
// 128) and 128, or 256 if v is negative, are numbers whose low bits are those of v; v is their difference.
__device__ inline uint32_t int8_to_bf16x2(uint32_t bytes) {
    const uint32_t low = (bytes & 0x007f007fu) | 0x43004300u, base = (bytes & 0x00800080u) | 0x43004300u;
    return fma_bf16x2(base, 0xbf80bf80u, low);
}

// Whether memory that is loaded stays in the first-level cache.
enum class Reuse { no, yes };

// 16 bytes; zeros, and no access, unless `condition`. There is no branch, so that many loads are on the way at
// once. The loads are coherent: the kernel before may have written what they read (dependent_launch.h).
template <Reuse kReuse, class T>
__device__ inline Pack<T, kWidestPack<T>> load_if(bool condition, const T* from) {
#if defined(__CUDA_ARCH__)
    union {
        uint32_t word[4];
        Pack<T, kWidestPack<T>> pack;
    } loaded;
    if (kReuse == Reuse::yes) {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
            "mov.u32 %3, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
            : "=r"(loaded.word[0]), "=r"(loaded.word[1]), "=r"(loaded.word[2]), "=r"(loaded.word[3])
            : "l"(from), "r"(static_cast<uint32_t>(condition)));
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
            "mov.u32 %3, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
            : "=r"(loaded.word[0]), "=r"(loaded.word[1]), "=r"(loaded.word[2]), "=r"(loaded.word[3])
            : "l"(from), "r"(static_cast<uint32_t>(condition)));
    }
    return loaded.pack;
#else
    return condition ? load_pack<T, kWidestPack<T>>(from) : Pack<T, kWidestPack<T>>{};
#endif
}

// An element, or `otherwise` without an access; no branch here either.
__device__ inline int32_t load_if(bool condition, const int32_t* from, int32_t otherwise) {
#if defined(__CUDA_ARCH__)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.b32 %0, [%1]; }"
                 : "+r"(otherwise)
                 : "l"(from), "r"(static_cast<uint32_t>(condition)));
    return otherwise;
#else
    return condition ? *from : otherwise;
#endif
}

inline bool is_aligned(const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether every row starts at, and has a width of, a multiple of 16 bytes.
template <class T>
bool rows_allow_packs(const Rows& rows) {
    return rows.width % kWidestPack<T> == 0 && (rows.count <= 1 || rows.stride % kWidestPack<T> == 0) &&
           is_aligned(rows.data, 16);
}

}  // namespace blip3o::cuda
