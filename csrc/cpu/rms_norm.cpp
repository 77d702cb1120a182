// RMSNorm of rows with an optional residual: one pass to add and sum squares, one to scale. Memory bound.
#include "blip3o/ops/rms_norm.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

// residual += x, rounded to T; returns the sum of squares of what was stored.
template <class T>
float add_and_sum_squares(const T* x, T* residual, int64_t width) {
    Vec squares = {};
    for_each_vector(width, [&](int64_t i, int64_t count) {
        store(residual + i, load(residual + i, count) + load(x + i, count), count);
        const Vec y = load(residual + i, count);
        squares += y * y;
    });
    return sum_lanes(squares);
}

template <class T>
float sum_squares(const T* x, int64_t width) {
    Vec squares = {};
    for_each_vector(width, [&](int64_t i, int64_t count) {
        const Vec y = load(x + i, count);
        squares += y * y;
    });
    return sum_lanes(squares);
}

template <class T>
void scale_row(T* out, const T* y, float scale, const T* weight, const T* bias, int64_t width) {
    for_each_vector(width, [&](int64_t i, int64_t count) {
        Vec value = load(y + i, count) * scale * load(weight + i, count);
        if (bias) value += load(bias + i, count);
        store(out + i, value, count);
    });
}

template <class T>
void norm_rows(const RmsNormArguments& a, int64_t begin, int64_t end) {
    const int64_t width = a.x.width;
    for (int64_t row = begin; row < end; ++row) {
        const T* y = a.x.row<T>(row);
        float squares;
        if (a.residual.data) {
            squares = add_and_sum_squares(y, a.residual.row<T>(row), width);
            y = a.residual.row<T>(row);
        } else {
            squares = sum_squares(y, width);
        }
        const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + a.eps);
        scale_row(a.out.row<T>(row), y, scale, static_cast<const T*>(a.weight), static_cast<const T*>(a.bias),
                  width);
    }
}

}  // namespace

void rms_norm(const RmsNormArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? norm_rows<bf16>(arguments, begin, end)
                                   : norm_rows<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
