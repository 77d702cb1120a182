// Rows in 8 bits: each as the nearest multiples of its scale, which is its largest element / 127. Memory bound.
#include "blip3o/ops/quantize_rows.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr float kLargest = 127.0f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// The largest magnitude of a row. Magnitudes order as their bits do, and a NaN is above every number.
template <class T>
BLIP3O_INLINE float largest_magnitude(const T* row, int64_t width) {
    VecInt largest = {};
    for_each_vector(width, [&](int64_t i, int64_t count) {
        const VecInt magnitude = (VecInt)load(row + i, count) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    });
    int32_t bits = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
void quantize(const QuantizeRowsArguments& a, int64_t begin, int64_t end) {
    const VecInt rounder = (VecInt)broadcast(kRounder);
    for (int64_t r = begin; r < end; ++r) {
        const T* row = a.x.row<T>(r);
        int8_t* out = a.out.row<int8_t>(r);
        const float scale = largest_magnitude(row, a.x.width) / kLargest;
        // A scale without an inverse is that of a row of zeros, or next to them.
        const float inverse = 1.0f / scale <= 3.4028235e38f ? 1.0f / scale : 0.0f;
        a.scale[r] = scale;
        for_each_vector(a.x.width, [&](int64_t i, int64_t count) {
            const VecInt values = (VecInt)(load(row + i, count) * inverse + kRounder) - rounder;
            store(out + i, values, count);
        });
    }
}

}  // namespace

void quantize_rows(const QuantizeRowsArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? quantize<bf16>(arguments, begin, end)
                                   : quantize<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
