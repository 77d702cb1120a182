// x weight^T + bias for few rows of x.
//
// The weight is read once, K N elements for 2 M K N operations: one row runs at the speed of memory. Float32 x
// takes a bfloat16 weight too, which is exact as floats.
#include "blip3o/ops/row_linear.h"
#include "cpu/row_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class T, class W, class Out>
void product(const RowProductArguments& a, int64_t begin, int64_t end) {
    const T* bias = static_cast<const T*>(a.bias);
    row_products<T, W, Out>(a.x, a.weight, a.out, begin, end, [&](int64_t column, float value) {
        return bias ? value + load(bias + column, 1)[0] : value;
    });
}

}  // namespace

void row_linear(const RowProductArguments& arguments, int64_t begin, int64_t end) {
    if (arguments.weight_dtype == DType::f32) return product<float, float, float>(arguments, begin, end);
    if (arguments.dtype == DType::f32) return product<float, bf16, float>(arguments, begin, end);
    arguments.out_dtype == DType::f32 ? product<bf16, bf16, float>(arguments, begin, end)
                                      : product<bf16, bf16, bf16>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
