// The tensor cores' product of small matrices of bfloat16.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace blip3o::cuda {

// sums [16, 8] += a [16, 16] b [16, 8] by one warp, in float. With g = lane / 4, t = lane % 4, a lane holds
//     a     rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1 of the first half twice, then of the second
//     b     column g; rows 2 t and 2 t + 1 of the first half, then of the second
//     sums  row g, columns 2 t and 2 t + 1; then row g + 8
// (PTX ISA, "Matrix Fragments for mma.m16n8k16"). A column of the sums depends on that column of b alone.
// Under g++, in tests, cuda_runtime.h stands in with functions of the same names.
//
// load_transposed gives each lane what it holds of b for two such products side by side (columns 0 .. 7 in
// `b[0]` and `b[1]`, 8 .. 15 in `b[2]` and `b[3]`) out of 16 rows in shared memory. Lane i names 16 bytes of
// row i % 16: its first eight columns, or from lane 16 on the other eight (PTX ISA, "ldmatrix").
#if defined(__CUDACC__)
__device__ inline void load_transposed(uint32_t (&b)[4], const void* row) {
#if defined(__CUDA_ARCH__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

__device__ inline void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

}  // namespace blip3o::cuda
