// Tiles of dot products between two sets of rows, the core of row_linear, nearest_code and attention scores.
//
// Every product is one chain of multiply-adds per lane over k in order, then one sum over the lanes: its bits
// depend on the two rows alone, not on the tile it was computed in.
#pragma once

#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {

// The sums of a tile, a vector of each column and one of x fit the registers: 32 with AVX-512, 16 else. Rows share
// the conversion of a column to floats, so there are as many as that leaves.
constexpr int kTileRows = 4;
constexpr int kTileColumns = kLanes == 16 ? 4 : 3;

// Neighboring rows of a matrix in memory are something that the hardware's prefetchers follow badly (half the speed
// of one stream with AVX-512), so a tile can fetch what is read later in one stream while it computes.
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

template <class T>
using DotTile = void (*)(const float*, int64_t, const T*, int64_t, int64_t, const char*, float*);

// The tile for `rows` (1 .. kTileRows) rows.
template <bool kFetch, int kColumns, class T>
BLIP3O_INLINE DotTile<T> tile_of(int64_t rows) {
    constexpr DotTile<T> kTiles[kTileRows] = {
        dot_tile<kFetch, 1, kColumns, T>, dot_tile<kFetch, 2, kColumns, T>, dot_tile<kFetch, 3, kColumns, T>,
        dot_tile<kFetch, 4, kColumns, T>};
    return kTiles[rows - 1];
}

// All rows of x with kColumns rows of w, tile by tile; `next`, unless null, is fetched during the first.
template <int kColumns, class T, class Emit>
BLIP3O_INLINE void dot_column_block(const float* x, int64_t x_stride, int64_t rows, const T* w,
                                    int64_t w_stride, int64_t size, const char* next, const Emit& emit) {
    float products[kTileRows * kColumns];
    for (int64_t r = 0; r < rows; next = nullptr) {
        const int64_t tile_rows = smaller(rows - r, kTileRows);
        const auto tile =
            next ? tile_of<true, kColumns, T>(tile_rows) : tile_of<false, kColumns, T>(tile_rows);
        tile(x + r * x_stride, x_stride, w, w_stride, size, next, products);
        for (int64_t i = 0; i < tile_rows; ++i, ++r) {
            for (int64_t c = 0; c < kColumns; ++c) emit(r, c, products[i * kColumns + c]);
        }
    }
}

// emit(row, column, value) for all rows of x and all `columns` rows of w, column block by column block.
// Meanwhile as many elements are fetched from `next` on as w has, unless it is null: w is in the cache then.
template <class T, class Emit>
BLIP3O_INLINE void dot_products(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride,
                                int64_t columns, int64_t size, const T* next, const Emit& emit) {
    int64_t c = 0;
    const auto at = [&](int64_t first) {
        return [&emit, first](int64_t row, int64_t column, float value) { emit(row, first + column, value); };
    };
    const auto later = [&](int64_t column) {
        return next ? reinterpret_cast<const char*>(next + column * w_stride) : nullptr;
    };
    for (; c + kTileColumns <= columns; c += kTileColumns) {
        dot_column_block<kTileColumns>(x, x_stride, rows, w + c * w_stride, w_stride, size, later(c), at(c));
    }
    for (; c < columns; ++c) {
        dot_column_block<1>(x, x_stride, rows, w + c * w_stride, w_stride, size, later(c), at(c));
    }
}

// The same for few rows and a w in memory, read as kColumns streams: row c of every one of as many equal parts of w.
// Zen 3's prefetchers follow four streams at 1.1 times the rate of a loop that sums one (with AVX2). Neighboring rows
// and instructions that fetch the next ones reach 0.8 of it.
template <int kColumns, class T, class Emit>
BLIP3O_INLINE void dot_streams(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride,
                               int64_t columns, int64_t size, const Emit& emit) {
    const int64_t run = columns / kColumns;
    for (int64_t c = 0; c < run; ++c) {
        dot_column_block<kColumns>(
            x, x_stride, rows, w + c * w_stride, run * w_stride, size, nullptr,
            [&](int64_t row, int64_t stream, float value) { emit(row, stream * run + c, value); });
    }
    const int64_t done = run * kColumns;
    dot_products(x, x_stride, rows, w + done * w_stride, w_stride, columns - done, size,
                 static_cast<const T*>(nullptr),
                 [&](int64_t row, int64_t column, float value) { emit(row, done + column, value); });
}

}  // namespace blip3o::cpu::BLIP3O_ISA
