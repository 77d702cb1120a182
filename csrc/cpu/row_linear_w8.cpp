// (x weight^T) scale + bias for few rows of x and an int8 weight with a scale for each of its rows.
//
// The weight is read once, K N bytes for 2 M K N operations, half of what bfloat16 takes. Every int8 is exact
// as a float, so nothing but the sum is rounded. Widening costs two instructions per vector, which one row
// hides behind the memory; products of bytes (VNNI, x as three signed digits to keep its precision) were no
// faster there and half as fast for four rows.
#include "blip3o/ops/row_linear_w8.h"
#include "cpu/row_products.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class T, class Out>
void product(const RowProductArguments& a, int64_t begin, int64_t end) {
    const T* bias = static_cast<const T*>(a.bias);
    row_products<T, int8_t, Out>(a.x, a.weight, a.out, begin, end, [&](int64_t column, float value) {
        const float scaled = value * a.scale[column];
        return bias ? scaled + load(bias + column, 1)[0] : scaled;
    });
}

}  // namespace

void row_linear_w8(const RowProductArguments& arguments, int64_t begin, int64_t end) {
    if (arguments.dtype == DType::f32) return product<float, float>(arguments, begin, end);
    arguments.out_dtype == DType::f32 ? product<bf16, float>(arguments, begin, end)
                                      : product<bf16, bf16>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
