// x weight^T for many rows of x and a weight of bfloat16, or of int8 with a scale for each of its rows.
//
// Numbers   bfloat16 x is multiplied in pairs by vdpbf16ps; float32 x with the weight widened to float32.
// Blocking  the columns of the result go in panels of 48, whose rows of the weight are put into the order that
//           the processor multiplies in, once, in the second-level cache; the weight is widened on the way. All
//           rows of x pass over a panel in tiles of 8 x 48. Threads share the columns out in sixteens, so a range
//           may end with a narrower panel. More than 8 MiB of x (2 of float32) go in slices, each with all panels.
//           Without AVX-512 panels have 16 (8) columns and tiles 6 rows.
// Bytes     the weight once per slice, the result once; x once per panel, from the last-level cache. While a
//           tile is computed the rows of the next one are fetched, and the weight of the next panel.
// FLOPs     2 K per element: bound by the multipliers, which it keeps busy for about 95% of the time from some 500
//           rows on.
//
// An element of the result is one chain over pairs of steps in order, or the sum in order of float32 chains of
// kChainSteps steps: its bits depend on its row and column alone. Without vdpbf16ps the product of bfloat16 is
// that of row_linear.
#include "blip3o/ops/linear.h"
#include "cpu/pair_products.h"
#include "cpu/row_products.h"
#include "cpu/tile_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kChainSteps = 512;  // of float32 in one chain: the shorter, the less is rounded

// Columns `column` on of a range, and what they are multiplied by.
struct Panel {
    const void* weight;
    int64_t column, columns, vectors;
};

// The columns of a panel, for `count` rows from `row` on: scaled, the bias added, rounded to T.
template <class T>
void finish(const LinearArguments& a, const Panel& panel, const float* sums, int64_t row, int64_t count) {
    for (int64_t v = 0; v < panel.vectors; ++v) {
        const int64_t column = panel.column + v * kLanes, there = smaller(panel.columns - v * kLanes, kLanes);
        const Vec scale = a.scale ? load(a.scale + column, there) : broadcast(1.0f);
        const Vec bias = a.bias ? load(static_cast<const T*>(a.bias) + column, there) : Vec{};
        for (int64_t r = 0; r < count; ++r) {
            const Vec sum = load(sums + (r * panel.vectors + v) * kLanes);
            store(a.out.row<T>(row + r) + column, sum * scale + bias, there);
        }
    }
}

// Products of float32 rows with panels of the weight widened to float32.
template <class W>
struct FloatProducts {
    using Element = float;
    static constexpr int64_t kVectors = kProductVectors;
    static constexpr int64_t kSliceBytes = 2 << 20;  // narrow panels read it often: it must stay in the cache

    static int64_t scratch_floats(int64_t width) { return kVectors * kLanes * width; }

    static void pack(const Rows& weight, const Panel& panel, void* to) {
        const int64_t stride = panel.vectors * kLanes;
        float* columns = static_cast<float*>(to);
        for (int64_t first = 0; first < stride; first += kLanes) {
            for_each_vector(weight.width, [&](int64_t k, int64_t steps) {
                Vec lanes[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    const W* row = weight.row<const W>(panel.column + first + i) + k;
                    lanes[i] = first + i < panel.columns ? load(row, steps) : Vec{};
                }
                transpose(lanes);
                for (int64_t i = 0; i < steps; ++i) store(columns + (k + i) * stride + first, lanes[i]);
            });
        }
    }

    // The hardware follows the few streams of whole rows by itself: nothing is fetched.
    static void multiply(const LinearArguments& a, const Panel& panel, const char*, int64_t) {
        const int64_t tiles = (a.x.count + kTallRows - 1) / kTallRows;
        const int64_t columns = panel.vectors * kLanes;
        const float* weight = static_cast<const float*>(panel.weight);
        float sums[kTallRows * kVectors * kLanes] = {};
        for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
            const int64_t count = a.x.count / tiles + (tile < a.x.count % tiles);
            for (int64_t k = 0; k < a.x.width; k += kChainSteps) {
                tall_tile(count, panel.vectors)({a.x.row<float>(row) + k, a.x.stride, 1},
                                                {weight + k * columns, columns},
                                                smaller(a.x.width - k, kChainSteps), sums, columns, k > 0);
            }
            finish<float>(a, panel, sums, row, count);
            row += count;
        }
    }
};

#if defined(__AVX512F__)

// Products of bfloat16 rows with panels of pairs.
template <class W>
struct PairProducts {
    using Element = bf16;
    static constexpr int64_t kVectors = kPairVectors;
    static constexpr int64_t kSliceBytes = 8 << 20;

    static int64_t scratch_floats(int64_t width) { return panel_floats(kVectors, width); }

    static void pack(const Rows& weight, const Panel& panel, void* to) {
        pack_columns(weight.row<const W>(panel.column), panel.columns, weight.stride, weight.width,
                     panel.vectors, static_cast<char*>(to));
    }

    static void multiply(const LinearArguments& a, const Panel& panel, const char* next, int64_t bytes) {
        panel.vectors == 1   ? multiply_panel<1>(a, panel, next, bytes)
        : panel.vectors == 2 ? multiply_panel<2>(a, panel, next, bytes)
                             : multiply_panel<3>(a, panel, next, bytes);
    }

    // All rows of x with a panel. The last tiles fetch the `bytes` of the weight from `next` on.
    template <int kPanelVectors>
    static void multiply_panel(const LinearArguments& a, const Panel& panel, const char* next,
                               int64_t bytes) {
        const int64_t rows = a.x.count, tiles = (rows + kPairRows - 1) / kPairRows, pairs = a.x.width / 2;
        const char* columns = static_cast<const char*>(panel.weight);
        float sums[kPairRows * kPanelVectors * kLanes];
        for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
            const int64_t count = rows / tiles + (tile < rows % tiles);
            const int64_t fetched = bytes - (tiles - tile) * pairs * 64;  // a line with each pair of steps
            const Ahead ahead = {reinterpret_cast<const char*>(a.x.row<bf16>(row + count)),
                                 fetched > -pairs * 64 ? next + fetched : columns};
            pair_tile_of<kPanelVectors>(count)(a.x.row<bf16>(row), a.x.stride, columns, pairs, ahead, sums,
                                               kPanelVectors * kLanes, false);
            finish<bf16>(a, panel, sums, row, count);
            row += count;
        }
    }
};

#endif

template <class Products, class W>
void multiply_panels(const LinearArguments& a, int64_t begin, int64_t end) {
    float* memory = thread_scratch(Products::scratch_floats(a.x.width));
    constexpr int64_t kColumns = Products::kVectors * kLanes;
    for (int64_t column = begin; column < end; column += kColumns) {
        const int64_t columns = smaller(end - column, kColumns);
        const Panel panel = {memory, column, columns, round_up(columns) / kLanes};
        Products::pack(a.weight, panel, memory);
        const char* next = reinterpret_cast<const char*>(a.weight.row<const W>(column + columns));
        const int64_t bytes = smaller(end - column - columns, kColumns) * a.weight.stride * sizeof(W);
        Products::multiply(a, panel, next, bytes);
    }
}

// Rows of x, which all panels pass over, at a time.
template <class Products, class W>
void multiply_slices(const LinearArguments& a, int64_t begin, int64_t end) {
    using T = typename Products::Element;
    const int64_t fitting = Products::kSliceBytes / static_cast<int64_t>(sizeof(T)) / (a.x.width + 1),
                  most = fitting < kTallRows ? kTallRows : fitting;
    for (int64_t first = 0; first < a.x.count; first += most) {
        LinearArguments slice = a;
        slice.x.count = slice.out.count = smaller(a.x.count - first, most);
        slice.x.data = a.x.row<T>(first);
        slice.out.data = a.out.row<T>(first);
        multiply_panels<Products, W>(slice, begin, end);
    }
}

template <class W>
void multiply(const LinearArguments& a, int64_t begin, int64_t end) {
    if (a.dtype == DType::f32) return multiply_slices<FloatProducts<W>, W>(a, begin, end);
#if defined(__AVX512F__)
    if (a.pair_products) return multiply_slices<PairProducts<W>, W>(a, begin, end);
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
