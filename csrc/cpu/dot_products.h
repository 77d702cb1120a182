// Tiles of dot products between two sets of rows, the core of row_linear, nearest_code and attention scores.
//
// Every product is one chain of multiply-adds per lane over k in order, then one sum over the lanes: its bits
// depend on the two rows alone, not on the tile it was computed in.
#pragma once

#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {

// Accumulators of a tile must fit the registers: 32 with AVX-512, 16 else.
constexpr int kTileRows = kLanes == 16 ? 4 : 2;
constexpr int kTileColumns = 4;

// Where the rows of w are. Four rows of a matrix in memory at a time are something that the hardware's
// prefetchers follow badly (half the speed of one stream), so a tile fetches the next four in one stream
// while it computes.
enum class Source { cache, memory };

// Fetches step number `step` of kBytes each into the second-level cache.
template <int64_t kBytes>
BLIP3O_INLINE void prefetch(const char* from, int64_t step) {
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(from + step * kBytes + line, 0, 2);
}

// products[row * kColumns + column] of kRows rows of x (floats, zero-padded to whole vectors) and kColumns
// rows of w. Unless null, `next` is memory to fetch meanwhile, as much as the tile reads of w. Not inlined:
// alone, the compiler keeps all sums in registers.
template <bool kFetch, int kRows, int kColumns, class T>
__attribute__((noinline)) void dot_tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride,
                                        int64_t size, const char* next, float* products) {
    Vec sums[kRows][kColumns] = {};
    for_each_vector(size, [&](int64_t k, int64_t count) {
        if (kFetch) prefetch<kColumns * kLanes * sizeof(T)>(next, k / kLanes);
        Vec columns[kColumns];
        for (int c = 0; c < kColumns; ++c) columns[c] = load(w + c * w_stride + k, count);
        for (int r = 0; r < kRows; ++r) {
            const Vec row = load(x + r * x_stride + k);
            for (int c = 0; c < kColumns; ++c) sums[r][c] += row * columns[c];
        }
    });
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kColumns; ++c) products[r * kColumns + c] = sum_lanes(sums[r][c]);
    }
}

// All rows of x with kColumns rows of w, tile by tile; `next`, unless null, is fetched during the first.
template <int kColumns, class T, class Emit>
BLIP3O_INLINE void dot_column_block(const float* x, int64_t x_stride, int64_t rows, const T* w,
                                    int64_t w_stride, int64_t size, const char* next, const Emit& emit) {
    float products[kTileRows * kColumns];
    for (int64_t r = 0; r < rows; next = nullptr) {
        const int64_t left = rows - r, tile_rows = left >= kTileRows ? kTileRows : left >= 2 ? 2 : 1;
        const auto tile =
            tile_rows == 1 ? (next ? dot_tile<true, 1, kColumns, T> : dot_tile<false, 1, kColumns, T>)
            : tile_rows == 2
                ? (next ? dot_tile<true, 2, kColumns, T> : dot_tile<false, 2, kColumns, T>)
                : (next ? dot_tile<true, kTileRows, kColumns, T> : dot_tile<false, kTileRows, kColumns, T>);
        tile(x + r * x_stride, x_stride, w, w_stride, size, next, products);
        for (int64_t i = 0; i < tile_rows; ++i, ++r) {
            for (int64_t c = 0; c < kColumns; ++c) emit(r, c, products[i * kColumns + c]);
        }
    }
}

// emit(row, column, value) for all rows of x and all `columns` rows of w, column block by column block.
template <class T, class Emit>
BLIP3O_INLINE void dot_products(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride,
                                int64_t columns, int64_t size, Source source, const Emit& emit) {
    int64_t c = 0;
    const auto at = [&](int64_t first) {
        return [&emit, first](int64_t row, int64_t column, float value) { emit(row, first + column, value); };
    };
    for (; c + kTileColumns <= columns; c += kTileColumns) {
        const T* block = w + c * w_stride;
        const char* next = reinterpret_cast<const char*>(block + kTileColumns * w_stride);
        dot_column_block<kTileColumns>(x, x_stride, rows, block, w_stride, size,
                                       source == Source::memory ? next : nullptr, at(c));
    }
    for (; c < columns; ++c) {
        dot_column_block<1>(x, x_stride, rows, w + c * w_stride, w_stride, size, nullptr, at(c));
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
