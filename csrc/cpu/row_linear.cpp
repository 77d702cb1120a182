// x weight^T + bias for few rows of x.
//
// The weight is read from memory once per panel of rows of x, in blocks of four of its rows that stay in the
// cache while all rows of the panel pass: K N elements for 2 M K N operations. One row runs at the speed of
// memory. With many rows a block is widened to floats first, so that its conversion is paid once and not per
// tile.
#include "cpu/dot_products.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kPanelFloats = 128 * 1024;  // 512 KiB of x, half of a second-level cache
constexpr int64_t kWidenedRows = 32;          // from here on blocks of the weight are widened

// Rows of x that are multiplied with one block of the weight before the next block is read.
int64_t panel_rows(int64_t rows, int64_t padded) {
    const int64_t fitting = kPanelFloats / padded / kTileRows * kTileRows;
    const int64_t panel = fitting < 2 * kTileRows ? 2 * kTileRows : fitting;
    return rows < panel ? rows : panel;
}

template <class T, class Out>
void product(const RowLinearArguments& a, int64_t begin, int64_t end) {
    const int64_t inputs = a.x.width;
    const int64_t padded = round_up(inputs) + kLanes;  // rows at a power of two would share cache sets
    const int64_t panel = panel_rows(a.x.count, padded);
    float* x = thread_scratch((panel + kTileColumns) * padded);
    float* block = x + panel * padded;
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t first = 0; first < a.x.count; first += panel) {
        const int64_t rows = a.x.count - first < panel ? a.x.count - first : panel;
        for (int64_t r = 0; r < rows; ++r) widen_row(x + r * padded, a.x.row<T>(first + r), inputs);
        const auto emit_from = [&](int64_t column) {
            return [&, column](int64_t r, int64_t c, float value) {
                if (bias) value += load(bias + column + c, 1)[0];
                store(a.out.row<Out>(first + r) + column + c, broadcast(value), 1);
            };
        };
        if (rows < kWidenedRows || sizeof(T) == sizeof(float)) {
            dot_products(x, padded, rows, a.weight.row<T>(begin), a.weight.stride, end - begin, inputs,
                         Source::memory, emit_from(begin));
            continue;
        }
        for (int64_t column = begin; column < end; column += kTileColumns) {
            const int64_t columns = end - column < kTileColumns ? end - column : kTileColumns;
            for (int64_t c = 0; c < columns; ++c) {
                widen_row(block + c * padded, a.weight.row<T>(column + c), inputs);
            }
            dot_products(x, padded, rows, block, padded, columns, inputs, Source::cache, emit_from(column));
        }
    }
}

}  // namespace

void row_linear(const RowLinearArguments& arguments, int64_t begin, int64_t end) {
    if (arguments.dtype == DType::f32) return product<float, float>(arguments, begin, end);
    arguments.out_dtype == DType::f32 ? product<bf16, float>(arguments, begin, end)
                                      : product<bf16, bf16>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
