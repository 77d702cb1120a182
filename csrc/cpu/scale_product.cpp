// A product with quantized matrices times the scales of its columns and rows, plus a bias. Memory bound.
#include "blip3o/ops/scale_product.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class Product, class Out>
void scale_rows(const ScaleProductArguments& a, int64_t begin, int64_t end) {
    const Out* bias = static_cast<const Out*>(a.bias);
    for (int64_t r = begin; r < end; ++r) {
        const Product* product = a.product.row<Product>(r);
        Out* out = a.out.row<Out>(r);
        const float row_scale = a.row_scale ? a.row_scale[r] : 1.0f;
        for_each_vector(a.product.width, [&](int64_t i, int64_t count) {
            const Vec scaled = load(product + i, count) * row_scale * load(a.scale + i, count);
            store(out + i, bias ? scaled + load(bias + i, count) : scaled, count);
        });
    }
}

}  // namespace

void scale_product(const ScaleProductArguments& arguments, int64_t begin, int64_t end) {
    if (arguments.product_dtype != DType::i32) {
        arguments.dtype == DType::bf16 ? scale_rows<bf16, bf16>(arguments, begin, end)
                                       : scale_rows<float, float>(arguments, begin, end);
    } else {
        arguments.dtype == DType::bf16 ? scale_rows<int32_t, bf16>(arguments, begin, end)
                                       : scale_rows<int32_t, float>(arguments, begin, end);
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
