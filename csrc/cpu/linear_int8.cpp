// (x weight^T) scale for many rows of bfloat16 x and an int8 weight with a scale for each of its rows.
//
// Columns of the result go in panels. A panel's rows of the weight are widened to bfloat16, in which every int8
// is exact, and put into the order that vdpbf16ps multiplies in: pairs of steps, one per column. That is done
// once, in the second-level cache, while all rows of x pass over it in tiles that live in registers. Half the
// bytes of a bfloat16 weight come from memory, fetched for the next panel while this one is multiplied.
//
// An element of the result is one chain over the pairs in order: its bits depend on its row and column alone.
// Without vdpbf16ps the product is that of row_linear_int8.
#include "cpu/kernels.h"
#include "cpu/row_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

#if defined(__AVX512F__)

#define BLIP3O_BF16_PRODUCTS __attribute__((target("avx512bf16")))

constexpr int kRows = 8;                                // of a tile
constexpr int kVectors = kLinearInt8Columns / kLanes;   // of a tile; its sums take 24 of the 32 registers
constexpr int64_t kStepBytes = kLinearInt8Columns * 4;  // of a panel: two bfloat16 for each column
constexpr int64_t kBlock = 64;                          // steps that a vector of int8 holds

// A 16 x 16 matrix of four bytes each, one row per vector, is turned.
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

// The mask of the first `count` lanes, none and all included.
BLIP3O_INLINE __mmask16 lanes_below(int64_t count) {
    return count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1;
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

// The rows begin .. end of the weight as a panel; columns and steps that are not there are zero.
void fill_panel(const Rows& weight, int64_t begin, int64_t end, char* panel) {
    for (int64_t first = 0; first < kLinearInt8Columns; first += kLanes) {
        for (int64_t k = 0; k < weight.width; k += kBlock) {
            const int64_t left = weight.width - k;
            const __mmask64 there = left >= kBlock ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
            __m512i rows[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t row = begin + first + i;
                rows[i] = row < end ? _mm512_maskz_loadu_epi8(there, weight.row<int8_t>(row) + k) : __m512i{};
            }
            transpose(rows);
            char* to = panel + k / 2 * kStepBytes + first * 4;
            for (int64_t i = 0; i < kLanes; ++i, to += 2 * kStepBytes) {
                const VecInt lanes = (VecInt)rows[i];
                store_pairs(to, byte_as_float<0>(lanes), byte_as_float<1>(lanes));
                store_pairs(to + kStepBytes, byte_as_float<2>(lanes), byte_as_float<3>(lanes));
            }
        }
    }
}

// count rows of x from `row` on with a panel, into the columns begin .. end of out. `next`, unless null, is
// memory to fetch meanwhile, as much as a panel's rows of the weight. Not inlined: alone, the compiler keeps
// all sums in registers.
template <int count>
BLIP3O_BF16_PRODUCTS __attribute__((noinline)) void multiply(const LinearInt8Arguments& a, int64_t row,
                                                             const char* panel, int64_t begin, int64_t end,
                                                             const char* next) {
    __m512 sums[count][kVectors] = {};
    const bf16* x = a.x.row<bf16>(row);
    for (int64_t step = 0; step < a.x.width / 2; ++step) {
        if (next) {
            const char* line = next + step * (kStepBytes / 2);
            __builtin_prefetch(line, 0, 2);
            __builtin_prefetch(line + 64, 0, 2);
        }
        __m512bh columns[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            columns[v] = (__m512bh)_mm512_loadu_si512(panel + step * kStepBytes + v * 64);
        }
        for (int r = 0; r < count; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * a.x.stride + 2 * step, sizeof pair);
            const __m512bh factors = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factors, columns[v]);
        }
    }
#pragma GCC unroll 8  // sums stay in registers
    for (int r = 0; r < count; ++r) {
        bf16* out = a.out.row<bf16>(row + r);
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = begin + v * kLanes;
            const __mmask16 there = lanes_below(end - column);
            const __m512 scaled = sums[r][v] * _mm512_maskz_loadu_ps(there, a.scale + column);
            _mm256_mask_storeu_epi16(out + column, there, (__m256i)_mm512_cvtneps_pbh(scaled));
        }
    }
}

using Multiply = void (*)(const LinearInt8Arguments&, int64_t, const char*, int64_t, int64_t, const char*);
constexpr Multiply kMultiply[kRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                       multiply<5>, multiply<6>, multiply<7>, multiply<8>};

void multiply_panels(const LinearInt8Arguments& a, int64_t begin, int64_t end) {
    const int64_t steps = (a.x.width + kBlock - 1) / kBlock * kBlock / 2;
    char* panel = reinterpret_cast<char*>(thread_scratch(steps * kLinearInt8Columns));
    const int64_t rows = a.x.count, tiles = (rows + kRows - 1) / kRows;
    for (int64_t column = begin; column < end; column += kLinearInt8Columns) {
        const int64_t last = end - column < kLinearInt8Columns ? end : column + kLinearInt8Columns;
        fill_panel(a.weight, column, last, panel);
        const bool fetch = a.weight.stride == a.weight.width && last < end;
        const char* next = fetch ? a.weight.row<char>(last) : nullptr;
        for (int64_t tile = 0, row = 0; tile < tiles; ++tile, next = nullptr) {
            const int64_t count = rows / tiles + (tile < rows % tiles);
            kMultiply[count - 1](a, row, panel, column, last, next);
            row += count;
        }
    }
}

#endif

}  // namespace

void linear_int8(const LinearInt8Arguments& a, int64_t begin, int64_t end) {
    begin *= kLinearInt8Columns;
    end = end * kLinearInt8Columns < a.weight.count ? end * kLinearInt8Columns : a.weight.count;
#if defined(__AVX512F__)
    if (a.bf16_products) return multiply_panels(a, begin, end);
#endif
    row_products<bf16, int8_t, bf16>(a.x, a.weight, a.out, begin, end,
                                     [&](int64_t column, float value) { return value * a.scale[column]; });
}

}  // namespace blip3o::cpu::BLIP3O_ISA
