// Products of small matrices of floats in tiles that live in registers.
//
// An element of the result is one chain of multiply-adds over the steps in order, added to what was there:
// its bits depend on its row and its column alone, not on the tile it was computed in.
#pragma once

#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {

// Accumulators of a tile, one row of the right side and one broadcast must fit the registers: 32 with
// AVX-512, 16 else.
constexpr int kProductRows = kLanes == 16 ? 8 : 4;
constexpr int kProductVectors = kLanes == 16 ? 3 : 2;
constexpr int kTallRows = kLanes == 16 ? 8 : 6;  // as many as fit: long products are faster than with four

// Where the elements of the left side are: row r at step k is data[r * row + k * step].
struct LeftSide {
    const float* data;
    int64_t row, step;
};

// A matrix of floats whose rows are whole vectors and lie `stride` floats apart.
struct RightSide {
    const float* data;
    int64_t stride;
};

// result[r, :] (+)= sum over k of left[r, k] * right[k, :], kRows rows and kVectors vectors. Not inlined:
// alone, the compiler keeps all sums in registers.
template <int kRows, int kVectors>
__attribute__((noinline)) void product_tile(LeftSide left, RightSide right, int64_t steps, float* result,
                                            int64_t result_stride, bool add) {
    Vec sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < steps; ++k) {
        Vec columns[kVectors];
        for (int v = 0; v < kVectors; ++v) columns[v] = load(right.data + k * right.stride + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
            const Vec factor = broadcast(left.data[r * left.row + k * left.step]);
            for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * columns[v];
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            float* to = result + r * result_stride + v * kLanes;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
    }
}

using ProductTile = void (*)(LeftSide, RightSide, int64_t, float*, int64_t, bool);

template <int kVectors>
BLIP3O_INLINE ProductTile tall_tile(int64_t rows) {
    constexpr int kSeven = smaller(7, kTallRows);
    constexpr ProductTile kTiles[] = {product_tile<1, kVectors>,      product_tile<2, kVectors>,
                                      product_tile<3, kVectors>,      product_tile<4, kVectors>,
                                      product_tile<5, kVectors>,      product_tile<6, kVectors>,
                                      product_tile<kSeven, kVectors>, product_tile<kTallRows, kVectors>};
    return kTiles[rows - 1];
}

// The tile for `rows` (1 .. kTallRows) and `vectors` (1 .. kProductVectors).
BLIP3O_INLINE ProductTile tall_tile(int64_t rows, int64_t vectors) {
    return vectors == 1   ? tall_tile<1>(rows)
           : vectors == 2 ? tall_tile<2>(rows)
                          : tall_tile<kProductVectors>(rows);
}

// The tile for `vectors` (1 .. kProductVectors) of a full number of rows.
BLIP3O_INLINE void product_rows(LeftSide left, RightSide right, int64_t steps, int64_t vectors, float* result,
                                int64_t result_stride, bool add) {
    const auto tile = vectors == 1   ? product_tile<kProductRows, 1>
                      : vectors == 2 ? product_tile<kProductRows, 2>
                                     : product_tile<kProductRows, kProductVectors>;
    tile(left, right, steps, result, result_stride, add);
}

// All `vectors` of kProductRows rows.
BLIP3O_INLINE void product(LeftSide left, RightSide right, int64_t steps, int64_t vectors, float* result,
                           int64_t result_stride, bool add) {
    for (int64_t v = 0; v < vectors; v += kProductVectors) {
        const int64_t count = vectors - v < kProductVectors ? vectors - v : kProductVectors;
        product_rows(left, {right.data + v * kLanes, right.stride}, steps, count, result + v * kLanes,
                     result_stride, add);
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
