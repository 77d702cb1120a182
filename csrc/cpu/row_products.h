// Products of few rows of x with the rows of a weight, the core of row_linear and row_linear_w8.
//
// The weight is read from memory once per panel of rows of x, in blocks of four of its rows that stay in the
// cache while all rows of the panel pass. With many rows a block is widened to floats first, so that its
// conversion is paid once and not per tile.
#pragma once

#include "cpu/dot_products.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {

constexpr int64_t kPanelFloats = 128 * 1024;  // 512 KiB of x, half of a second-level cache
constexpr int64_t kWidenedRows = 32;          // from here on blocks of the weight are widened

// Rows of x that are multiplied with one block of the weight before the next block is read.
inline int64_t panel_rows(int64_t rows, int64_t padded) {
    const int64_t fitting = kPanelFloats / padded / kTileRows * kTileRows;
    const int64_t panel = fitting < 2 * kTileRows ? 2 * kTileRows : fitting;
    return rows < panel ? rows : panel;
}

// out = finish(column, x weight^T) for the columns begin .. end of out; x of type T, the weight of type W.
template <class T, class W, class Out, class Finish>
BLIP3O_INLINE void row_products(const Rows& all_x, const Rows& weight, const Rows& out, int64_t begin,
                                int64_t end, const Finish& finish) {
    const int64_t inputs = all_x.width;
    const int64_t padded = round_up(inputs) + kLanes;  // rows at a power of two would share cache sets
    const int64_t panel = panel_rows(all_x.count, padded);
    float* x = thread_scratch((panel + kTileColumns) * padded);
    float* block = x + panel * padded;
    for (int64_t first = 0; first < all_x.count; first += panel) {
        const int64_t rows = all_x.count - first < panel ? all_x.count - first : panel;
        for (int64_t r = 0; r < rows; ++r) widen_row(x + r * padded, all_x.row<T>(first + r), inputs);
        const auto emit_from = [&](int64_t column) {
            return [&, column](int64_t r, int64_t c, float value) {
                store(out.row<Out>(first + r) + column + c, broadcast(finish(column + c, value)), 1);
            };
        };
        if (rows < kWidenedRows || sizeof(W) == sizeof(float)) {
            const W* columns = weight.row<const W>(begin);
            if (kLanes == 16) {  // measured on Zen 4; streams were not
                dot_products(x, padded, rows, columns, weight.stride, end - begin, inputs,
                             columns + kTileColumns * weight.stride, emit_from(begin));
            } else if (rows <= 2) {
                dot_streams<4>(x, padded, rows, columns, weight.stride, end - begin, inputs,
                               emit_from(begin));
            } else {
                dot_streams<3>(x, padded, rows, columns, weight.stride, end - begin, inputs,
                               emit_from(begin));
            }
            continue;
        }
        for (int64_t column = begin; column < end; column += kTileColumns) {
            const int64_t columns = end - column < kTileColumns ? end - column : kTileColumns;
            for (int64_t c = 0; c < columns; ++c) {
                widen_row(block + c * padded, weight.row<const W>(column + c), inputs);
            }
            dot_products(x, padded, rows, block, padded, columns, inputs, static_cast<const float*>(nullptr),
                         emit_from(column));
        }
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
