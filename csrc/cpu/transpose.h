// A square of lanes is turned: lane j of vector i becomes lane i of vector j.
#pragma once

#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {

#if defined(__AVX512F__)

BLIP3O_INLINE void transpose(__m512i (&rows)[16]) {
    // Of all lanes: the forms without a mask make GCC 12 warn.
    constexpr __mmask16 kAll = 0xffff;
    constexpr __mmask8 kHalf = 0xff;
    __m512i turned[16];
    for (int i = 0; i < 16; i += 2) {
        turned[i] = _mm512_maskz_unpacklo_epi32(kAll, rows[i], rows[i + 1]);
        turned[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_maskz_unpacklo_epi64(kHalf, turned[i], turned[i + 2]);
        rows[i + 1] = _mm512_maskz_unpackhi_epi64(kHalf, turned[i], turned[i + 2]);
        rows[i + 2] = _mm512_maskz_unpacklo_epi64(kHalf, turned[i + 1], turned[i + 3]);
        rows[i + 3] = _mm512_maskz_unpackhi_epi64(kHalf, turned[i + 1], turned[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        turned[i] = _mm512_maskz_shuffle_i32x4(kAll, rows[i], rows[i + 4], 0x88);
        turned[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, rows[i], rows[i + 4], 0xdd);
        turned[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, rows[i + 8], rows[i + 12], 0x88);
        turned[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_maskz_shuffle_i32x4(kAll, turned[i], turned[i + 8], 0x88);
        rows[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, turned[i + 4], turned[i + 12], 0x88);
        rows[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, turned[i], turned[i + 8], 0xdd);
        rows[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, turned[i + 4], turned[i + 12], 0xdd);
    }
}

BLIP3O_INLINE void transpose(Vec (&rows)[16]) {
    __m512i lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = (__m512i)rows[i];
    transpose(lanes);
    for (int i = 0; i < 16; ++i) rows[i] = (Vec)lanes[i];
}

#elif defined(__AVX2__)

BLIP3O_INLINE void transpose(Vec (&rows)[8]) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = (Vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = (Vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

#else

BLIP3O_INLINE void transpose(Vec (&rows)[kLanes]) {
    for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            const float lane = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = lane;
        }
    }
}

#endif

}  // namespace blip3o::cpu::BLIP3O_ISA
