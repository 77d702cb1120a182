// e4m3, 8-bit floating point (a sign, 4 bits of exponent and 3 of fraction, no infinities), in wider formats.
#pragma once

#include "cuda/convert.h"

namespace blip3o::cuda {

// e4m3 as it lies in memory.
struct E4m3Bits {
    uint8_t bits;
};

// Two e4m3, in the upper bytes of the halves of a word whose lower ones are zero, as bfloat16. Their bits in
// the places of a bfloat16's are 2^-120 of the numbers, of subnormal ones too. What is no number, ones but for
// the sign, gets an exponent of ones, and so stays none.
__device__ inline uint32_t e4m3_to_bf16x2(uint32_t bytes) {
    const uint32_t small = (bytes & 0x80008000u) | (bytes >> 4 & 0x07f007f0u);
    const uint32_t no_number = (small + 0x00100010u) & 0x08000800u;
    return fma_bf16x2(small + 15 * no_number, 0x7b807b80u, 0x80008000u);  // times 2^120, plus -0
}

__device__ inline float to_float(E4m3Bits value) {
    return to_floats(e4m3_to_bf16x2(uint32_t{value.bits} << 8)).x;
}

}  // namespace blip3o::cuda
