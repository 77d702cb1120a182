// values weight^T of int8, summed in int32: exact for up to 2^17 steps.
//
// Blocking  16 rows of the weight become the columns of a panel, widened to int16: for each pair of steps one pair
//           of every column. All rows of values pass over it in tiles of 6 x 16, a few steps at a time, whose
//           widened values and panel stay in the first-level cache. A thread has whole panels.
// FLOPs     2 K per element. vpmaddwd multiplies 16 (32) numbers and adds neighbors, which int16 never
//           overflows: twice what a float product does, at one more addition. It is for processors without
//           VNNI, where a library's products of bytes are not exact.
#include "blip3o/ops/integer_product.h"

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

#if defined(__AVX2__)

constexpr int64_t kTileRows = 6;
constexpr int64_t kSteps = 512;
constexpr int64_t kVectors = kIntegerColumns / kLanes;

typedef int16_t Pairs __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));

BLIP3O_INLINE VecInt multiply_add(VecInt sums, Pairs a, Pairs b) {
#if defined(__AVX512BW__)
    return sums + (VecInt)_mm512_maskz_madd_epi16(0xffff, (__m512i)a, (__m512i)b);
#else
    return sums + (VecInt)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

BLIP3O_INLINE Pairs both(const int16_t* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return (Pairs)(VecInt{} + bits);
}

// Rows of int8 as int16, an odd last step beside a zero.
void widen(const int8_t* from, int64_t steps, int16_t* to) {
    for (int64_t k = 0; k < steps; ++k) to[k] = from[k];
    if (steps % 2 > 0) to[steps] = 0;
}

// Columns `column` on of the weight: [pairs of steps][column][2].
void pack(const Rows& weight, int64_t column, int64_t columns, int64_t first, int64_t steps, int16_t* panel) {
    for (int64_t c = 0; c < kIntegerColumns; ++c) {
        const int8_t* row = weight.row<const int8_t>(column + (c < columns ? c : 0)) + first;
        int16_t* to = panel + 2 * c;
        for (int64_t k = 0; k + 1 < steps; k += 2, to += 2 * kIntegerColumns) {
            to[0] = row[k];
            to[1] = row[k + 1];
        }
        if (steps % 2 > 0) to[0] = row[steps - 1], to[1] = 0;
    }
}

// sums [kRows][kVectors] += the products of kRows rows of `values` with a panel. Not inlined: alone, the
// compiler keeps all sums in registers.
template <int kRows>
__attribute__((noinline)) void tile(const int16_t* values, const int16_t* panel, int64_t pairs,
                                    VecInt* sums) {
    VecInt kept[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) kept[r][v] = sums[r * kVectors + v];
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        Pairs columns[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            std::memcpy(&columns[v], panel + (pair * kVectors + v) * 2 * kLanes, sizeof columns[v]);
        }
#pragma GCC unroll 6  // sums stay in registers
        for (int r = 0; r < kRows; ++r) {
            const Pairs factors = both(values + r * kSteps + 2 * pair);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) kept[r][v] = multiply_add(kept[r][v], factors, columns[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r * kVectors + v] = kept[r][v];
    }
}

void multiply_panel(const IntegerProductArguments& a, int64_t column, int64_t columns, const int16_t* panel) {
    constexpr decltype(&tile<1>) kTiles[kTileRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
    int16_t values[kTileRows * kSteps];
    VecInt sums[kTileRows * kVectors];
    for (int64_t row = 0; row < a.values.count; row += kTileRows) {
        const int64_t rows = smaller(a.values.count - row, kTileRows);
        for (VecInt& sum : sums) sum = VecInt{};
        for (int64_t k = 0; k < a.values.width; k += kSteps) {
            const int64_t steps = smaller(a.values.width - k, kSteps);
            for (int64_t r = 0; r < rows; ++r) {
                widen(a.values.row<const int8_t>(row + r) + k, steps, values + r * kSteps);
            }
            kTiles[rows - 1](values, panel + k * kIntegerColumns, (steps + 1) / 2, sums);
        }
        for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(a.out.row<int32_t>(row + r) + column, sums + r * kVectors, columns * sizeof(int32_t));
        }
    }
}

void multiply(const IntegerProductArguments& a, int64_t begin, int64_t end) {
    const int64_t width = (a.values.width + 1) / 2 * 2;
    int16_t* panel = reinterpret_cast<int16_t*>(thread_scratch(width * kIntegerColumns / 2));
    for (int64_t column = begin; column < end; column += kIntegerColumns) {
        const int64_t columns = smaller(end - column, kIntegerColumns);
        for (int64_t k = 0; k < a.values.width; k += kSteps) {
            pack(a.weight, column, columns, k, smaller(a.values.width - k, kSteps),
                 panel + k * kIntegerColumns);
        }
        multiply_panel(a, column, columns, panel);
    }
}

#else

void multiply(const IntegerProductArguments& a, int64_t begin, int64_t end) {
    for (int64_t row = 0; row < a.values.count; ++row) {
        const int8_t* values = a.values.row<const int8_t>(row);
        for (int64_t column = begin; column < end; ++column) {
            const int8_t* weight = a.weight.row<const int8_t>(column);
            int32_t sum = 0;
            for (int64_t k = 0; k < a.values.width; ++k) sum += values[k] * weight[k];
            a.out.row<int32_t>(row)[column] = sum;
        }
    }
}

#endif

}  // namespace

void integer_product(const IntegerProductArguments& a, int64_t begin, int64_t end) {
    multiply(a, begin * kIntegerColumns, smaller(end * kIntegerColumns, a.weight.count));
}

}  // namespace blip3o::cpu::BLIP3O_ISA
