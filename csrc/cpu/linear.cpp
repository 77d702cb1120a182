// x weight^T for many rows of bfloat16 x and a weight of bfloat16, or of int8 with a scale for each of its rows.
//
// Blocking  the columns of the result go in panels of 48, whose rows of the weight are put into the order that
//           the processor multiplies in, once, in the second-level cache; int8 is widened on the way. All rows
//           of x pass over a panel in tiles of 8 x 48. Threads share the columns out in sixteens, so a range
//           may end with a narrower panel. More than 8 MiB of x go in slices, each with all panels.
// Bytes     the weight once per slice, the result once; x once per panel, from the last-level cache. While a
//           tile is computed the rows of the next one are fetched, and the weight of the next panel.
// FLOPs     2 K per element: bound by the multipliers, which it keeps busy for about 95% of the time from some 500
//           rows on.
//
// An element of the result is one chain over pairs of steps in order: its bits depend on its row and column
// alone. Without vdpbf16ps the product is that of row_linear.
#include "blip3o/ops/linear.h"
#include "cpu/pair_products.h"
#include "cpu/row_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kSliceBytes = 8 << 20;

// Columns `column` on of a range, and what they are multiplied by.
struct Panel {
    const char* pairs;
    int64_t column, columns;
};

// The columns of a panel, for `count` rows from `row` on: scaled, the bias added, rounded.
template <int kVectors>
void finish(const LinearArguments& a, const Panel& panel, const float* sums, int64_t row, int64_t count) {
    for (int v = 0; v < kVectors; ++v) {
        const int64_t column = panel.column + v * kLanes, there = smaller(panel.columns - v * kLanes, kLanes);
        const Vec scale = a.scale ? load(a.scale + column, there) : broadcast(1.0f);
        const Vec bias = a.bias ? load(static_cast<const bf16*>(a.bias) + column, there) : Vec{};
        for (int64_t r = 0; r < count; ++r) {
            const Vec sum = load(sums + (r * kVectors + v) * kLanes);
            store(a.out.row<bf16>(row + r) + column, sum * scale + bias, there);
        }
    }
}

// All rows of x with a panel of kVectors vectors. The last tiles fetch the `bytes` of the weight from `next` on.
template <int kVectors>
void multiply_panel(const LinearArguments& a, const Panel& panel, const char* next, int64_t bytes) {
    const int64_t rows = a.x.count, tiles = (rows + kPairRows - 1) / kPairRows, pairs = a.x.width / 2;
    float sums[kPairRows * kVectors * kLanes];
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        const int64_t count = rows / tiles + (tile < rows % tiles);
        const int64_t fetched = bytes - (tiles - tile) * pairs * 64;  // a line with each pair of steps
        const Ahead ahead = {reinterpret_cast<const char*>(a.x.row<bf16>(row + count)),
                             fetched > -pairs * 64 ? next + fetched : panel.pairs};
        pair_tile_of<kVectors>(count)(a.x.row<bf16>(row), a.x.stride, panel.pairs, pairs, ahead, sums,
                                      kVectors * kLanes, false);
        finish<kVectors>(a, panel, sums, row, count);
        row += count;
    }
}

template <class W>
void multiply_panels(const LinearArguments& a, int64_t begin, int64_t end) {
    char* pairs = reinterpret_cast<char*>(thread_scratch(panel_floats(kPairVectors, a.x.width)));
    constexpr int64_t kColumns = kPairVectors * kLanes;
    for (int64_t column = begin; column < end; column += kColumns) {
        const int64_t columns = smaller(end - column, kColumns), vectors = round_up(columns) / kLanes;
        pack_columns(a.weight.row<const W>(column), columns, a.weight.stride, a.x.width, vectors, pairs);
        const char* next = reinterpret_cast<const char*>(a.weight.row<const W>(column + columns));
        const int64_t bytes = smaller(end - column - columns, kColumns) * a.weight.stride * sizeof(W);
        const Panel panel = {pairs, column, columns};
        vectors == 1   ? multiply_panel<1>(a, panel, next, bytes)
        : vectors == 2 ? multiply_panel<2>(a, panel, next, bytes)
                       : multiply_panel<3>(a, panel, next, bytes);
    }
}

// Rows of x, which all panels pass over, at a time.
template <class W>
void multiply_slices(const LinearArguments& a, int64_t begin, int64_t end) {
    const int64_t fitting = kSliceBytes / (2 * a.x.width + 1),
                  most = fitting < kPairRows ? kPairRows : fitting;
    for (int64_t first = 0; first < a.x.count; first += most) {
        LinearArguments slice = a;
        slice.x.count = slice.out.count = smaller(a.x.count - first, most);
        slice.x.data = a.x.row<bf16>(first);
        slice.out.data = a.out.row<bf16>(first);
        multiply_panels<W>(slice, begin, end);
    }
}

#endif

template <class W>
void multiply(const LinearArguments& a, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
    if (a.pair_products) return multiply_slices<W>(a, begin, end);
#endif
    const bf16* bias = static_cast<const bf16*>(a.bias);
    row_products<bf16, W, bf16>(a.x, a.weight, a.out, begin, end, [&](int64_t column, float value) {
        if (a.scale) value *= a.scale[column];
        return bias ? value + load(bias + column, 1)[0] : value;
    });
}

}  // namespace

void linear(const LinearArguments& a, int64_t begin, int64_t end) {
    begin *= kLinearColumns;
    end = smaller(end * kLinearColumns, a.weight.count);
    a.weight_dtype == DType::i8 ? multiply<int8_t>(a, begin, end) : multiply<bf16>(a, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
