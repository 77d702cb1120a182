// RMSNorm of the channels of each pixel, with bias, plus a residual, then ReLU where asked. A pixel is read
// from memory once and passed over twice. Memory bound: two elements in (one without a residual) and one out.
#include "blip3o/ops/channel_rms_norm.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class T>
float sum_squares(const T* x, int64_t width) {
    Vec squares = {};
    for_each_vector(width, [&](int64_t i, int64_t count) {
        const Vec value = load(x + i, count);
        squares += value * value;
    });
    return sum_lanes(squares);
}

// out may be x or the residual: an element is read before it is written.
template <class T>
void norm_pixels(const ChannelRmsNormArguments& a, int64_t begin, int64_t end) {
    const int64_t width = a.x.width;
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = a.x.row<T>(row);
        const T* residual = a.residual.data ? a.residual.row<T>(row) : nullptr;
        T* out = a.out.row<T>(row);
        const float scale = 1.0f / __builtin_sqrtf(sum_squares(x, width) / static_cast<float>(width) + a.eps);
        for_each_vector(width, [&](int64_t i, int64_t count) {
            Vec value = load(x + i, count) * scale * load(weight + i, count) + load(bias + i, count);
            if (residual) value += load(residual + i, count);
            if (a.relu) value = value < 0.0f ? Vec{} : value;  // a NaN stays one
            store(out + i, value, count);
        });
    }
}

}  // namespace

void channel_rms_norm(const ChannelRmsNormArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? norm_pixels<bf16>(arguments, begin, end)
                                   : norm_pixels<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
