// Products of rows of bfloat16 with a panel, in tiles that live in registers, by vdpbf16ps.
//
// The instruction adds the products of two pairs of numbers to each of 16 sums. The rows of the left side are
// read where they lie, a pair of steps at a time. The columns of the right side, at most kPairVectors vectors of
// them, are put into a panel first: for each pair of steps one pair of every column, zero where there is none.
//
// An element of the result is one chain over the pairs in order: its bits depend on its row and its column
// alone, not on the tile it was computed in. Numbers below 2^-126 count as zero: the instruction has no others.
#pragma once

#include "cpu/transpose.h"

#if defined(__AVX512F__)

namespace blip3o::cpu::BLIP3O_ISA {

#define BLIP3O_PAIR_PRODUCTS __attribute__((target("avx512bf16")))

constexpr int kPairRows = 8;  // of a tile, whose sums take 24 of the 32 registers
constexpr int kPairVectors = 3;

// Floats of scratch memory that hold a panel of so many vectors, its rows `width` long.
constexpr int64_t panel_floats(int64_t vectors, int64_t width) {
    constexpr int64_t kBlock = 64;  // steps that a vector of int8 holds
    return vectors * kLanes * ((width + kBlock - 1) / kBlock * kBlock / 2);
}

// Byte `index` of every lane as a float, the upper half of which is the bfloat16.
template <int index>
BLIP3O_INLINE VecBits byte_as_float(VecInt lanes) {
    return (VecBits) __builtin_convertvector((lanes << (24 - 8 * index)) >> 24, Vec);
}

// Two bfloat16 in a lane, `first` in its lower half.
BLIP3O_INLINE void store_pairs(char* to, VecBits first, VecBits second) {
    const VecBits pairs = (first >> 16) | second;
    std::memcpy(to, &pairs, sizeof pairs);
}

// The four steps in each lane as two pairs.
BLIP3O_INLINE void store_steps(char* to, int64_t step_bytes, __m512i lane, const int8_t*) {
    const VecInt steps = (VecInt)lane;
    store_pairs(to, byte_as_float<0>(steps), byte_as_float<1>(steps));
    store_pairs(to + step_bytes, byte_as_float<2>(steps), byte_as_float<3>(steps));
}

BLIP3O_INLINE void store_steps(char* to, int64_t, __m512i lane, const bf16*) {
    std::memcpy(to, &lane, sizeof lane);
}

// The `count` rows of T (bf16, or int8, which bf16 holds exactly) become the columns of a panel of `vectors`.
template <class T>
void pack_columns(const T* rows, int64_t count, int64_t stride, int64_t width, int64_t vectors, char* panel) {
    constexpr int64_t kBlock = 64 / sizeof(T), kPairs = 2 / sizeof(T);  // kPairs: of steps, in four bytes
    const int64_t step_bytes = vectors * 64;
    for (int64_t first = 0; first < vectors * kLanes; first += kLanes) {
        for (int64_t k = 0; k < width; k += kBlock) {
            const int64_t bytes = (width - k) * sizeof(T);
            const __mmask64 there = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
            __m512i lanes[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const T* row = rows + (first + i) * stride + k;
                lanes[i] = first + i < count ? _mm512_maskz_loadu_epi8(there, row) : __m512i{};
            }
            transpose(lanes);
            char* to = panel + k / 2 * step_bytes + first * 4;
            for (int64_t i = 0; i < kLanes; ++i, to += kPairs * step_bytes) {
                store_steps(to, step_bytes, lanes[i], rows);
            }
        }
    }
}

// Memory to fetch into the second-level cache while a tile is computed: for each pair of steps two numbers for
// every row, and a line.
struct Ahead {
    const char *rows, *line;
};

// result[r, :] (+)= the products of row r with the columns of a panel, for kRows rows and kVectors vectors. Not
// inlined: alone, the compiler keeps all sums in registers.
template <int kRows, int kVectors>
BLIP3O_PAIR_PRODUCTS __attribute__((noinline)) void pair_tile(const bf16* rows, int64_t stride,
                                                              const char* panel, int64_t pairs, Ahead ahead,
                                                              float* result, int64_t result_stride,
                                                              bool add) {
    __m512 sums[kRows][kVectors] = {};
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __builtin_prefetch(ahead.rows + pair * 4 * kRows, 0, 2);
        __builtin_prefetch(ahead.line + pair * 64, 0, 2);
        __m512bh columns[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            columns[v] = (__m512bh)_mm512_loadu_si512(panel + (pair * kVectors + v) * 64);
        }
        for (int r = 0; r < kRows; ++r) {
            int32_t both;
            std::memcpy(&both, rows + r * stride + 2 * pair, sizeof both);
            const __m512bh factors = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factors, columns[v]);
        }
    }
#pragma GCC unroll 8  // sums stay in registers
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            float* to = result + r * result_stride + v * kLanes;
            store(to, add ? load(to) + (Vec)sums[r][v] : (Vec)sums[r][v]);
        }
    }
}

using PairTile = void (*)(const bf16*, int64_t, const char*, int64_t, Ahead, float*, int64_t, bool);

// The tile for `rows` (1 .. kPairRows) rows of a panel of kVectors vectors.
template <int kVectors>
BLIP3O_INLINE PairTile pair_tile_of(int64_t rows) {
    constexpr PairTile kTiles[kPairRows] = {
        pair_tile<1, kVectors>, pair_tile<2, kVectors>, pair_tile<3, kVectors>, pair_tile<4, kVectors>,
        pair_tile<5, kVectors>, pair_tile<6, kVectors>, pair_tile<7, kVectors>, pair_tile<8, kVectors>};
    return kTiles[rows - 1];
}

}  // namespace blip3o::cpu::BLIP3O_ISA

#endif
