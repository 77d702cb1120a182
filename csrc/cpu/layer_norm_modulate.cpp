// LayerNorm of rows, scaled by 1 + scale and shifted. A row is read from memory once: its mean, its squared
// deviations and its result are three passes in the first-level cache. Memory bound: each element in and out.
#include "blip3o/ops/layer_norm_modulate.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class T>
float mean_of(const T* x, int64_t width) {
    Vec sum = {};
    for_each_vector(width, [&](int64_t i, int64_t count) { sum += load(x + i, count); });
    return sum_lanes(sum) / static_cast<float>(width);
}

// Deviations from the mean are summed anew, not taken from the mean of squares: that would cancel digits
// where the mean is far from zero.
template <class T>
float variance_of(const T* x, float mean, int64_t width) {
    Vec squares = {};
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec deviation = load(x + i) - mean;
        squares += deviation * deviation;
    }
    float sum = sum_lanes(squares);
    for (int64_t i = whole; i < width; ++i) {
        const float deviation = load(x + i, 1)[0] - mean;
        sum += deviation * deviation;
    }
    return sum / static_cast<float>(width);
}

template <class T, class Modulation, class Out>
void norm_rows(const LayerNormModulateArguments& a, int64_t begin, int64_t end) {
    const int64_t width = a.x.width;
    const auto* scale = static_cast<const Modulation*>(a.scale);
    const auto* shift = static_cast<const Modulation*>(a.shift);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = a.x.row<T>(row);
        Out* out = a.out.row<Out>(row);
        const float mean = mean_of(x, width);
        const float inverse = 1.0f / __builtin_sqrtf(variance_of(x, mean, width) + a.eps);
        for_each_vector(width, [&](int64_t i, int64_t count) {
            const Vec normed = (load(x + i, count) - mean) * inverse;
            store(out + i, normed * (1.0f + load(scale + i, count)) + load(shift + i, count), count);
        });
    }
}

template <class T, class Modulation>
void norm_rows_of(const LayerNormModulateArguments& a, int64_t begin, int64_t end) {
    a.out_dtype == DType::bf16 ? norm_rows<T, Modulation, bf16>(a, begin, end)
                               : norm_rows<T, Modulation, float>(a, begin, end);
}

}  // namespace

void layer_norm_modulate(const LayerNormModulateArguments& arguments, int64_t begin, int64_t end) {
    if (arguments.dtype != DType::bf16) {
        norm_rows<float, float, float>(arguments, begin, end);
    } else if (arguments.modulation_dtype == DType::bf16) {
        norm_rows_of<bf16, bf16>(arguments, begin, end);
    } else {
        norm_rows_of<bf16, float>(arguments, begin, end);
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
