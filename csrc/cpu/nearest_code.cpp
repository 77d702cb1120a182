// Row of the codebook with the largest dot product, for each row of features. The [N, C] scores never exist.
//
// N C D multiply-adds; compute bound. A panel of codes stays in the second-level cache while all rows pass
// it.
#include "blip3o/ops/nearest_code.h"
#include "cpu/dot_products.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kPanelFloats = 96 * 1024;  // 384 KiB of the codebook

int64_t panel_codes(int64_t width) {
    const int64_t fitting = kPanelFloats / width / kTileColumns * kTileColumns;
    return fitting < kTileColumns ? kTileColumns : fitting;
}

}  // namespace

void nearest_code(const NearestCodeArguments& a, int64_t begin, int64_t end) {
    const int64_t width = a.features.width, padded = round_up(width), rows = end - begin;
    const int64_t panel = panel_codes(width);
    float* features = thread_scratch(rows * (padded + 1));
    float* best = features + rows * padded;
    for (int64_t r = 0; r < rows; ++r) {
        widen_row(features + r * padded, a.features.row<const float>(begin + r), width);
        best[r] = -__builtin_inff();
        a.out[begin + r] = 0;
    }
    for (int64_t first = 0; first < a.codebook.count; first += panel) {
        const int64_t codes = a.codebook.count - first < panel ? a.codebook.count - first : panel;
        for (int64_t r = 0; r < rows; r += kTileRows) {
            const int64_t block = rows - r < kTileRows ? rows - r : kTileRows;
            dot_products(features + r * padded, padded, block, a.codebook.row<const float>(first),
                         a.codebook.stride, codes, width, static_cast<const float*>(nullptr),
                         [&](int64_t row, int64_t code, float score) {
                             if (score > best[r + row]) {  // codes come in order, so a tie keeps the lower
                                 best[r + row] = score;
                                 a.out[begin + r + row] = first + code;
                             }
                         });
        }
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
