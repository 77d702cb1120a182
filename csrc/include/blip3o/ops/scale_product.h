// product * row_scale * scale + bias.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct ScaleProductArguments {
    Rows product, out;
    const float* scale;      // of columns
    const float* row_scale;  // may be null
    const void* bias;        // may be null
    DType product_dtype, dtype;
};

struct ScaleProduct {
    static constexpr char kName[] = "scale_product";
    static constexpr char kParameters[] = "product, scale, *, out, row_scale=None, bias=None";

    static ScaleProductArguments check(Device device, const TensorView& product, const TensorView& scale,
                                       const TensorView& out, const OptionalView& row_scale,
                                       const OptionalView& bias) {
        Contract contract(kName, device);
        Dim rows("M"), columns("N");
        ScaleProductArguments a;
        a.product =
            contract(product, "product").dtype({DType::i32, DType::f32, DType::bf16}).rows(rows, columns);
        a.scale = contract(scale, "scale").array<float>({&columns});
        a.row_scale = contract(row_scale, "row_scale").array<float>({&rows});
        if (product.dtype == DType::i32) {
            contract(out, "out").dtype(kFloats);
        } else {
            contract(out, "out").dtype({product.dtype});
        }
        a.out = contract(out, "out").rows(rows, columns);
        a.bias = contract(bias, "bias").array(out.dtype, {&columns});
        a.product_dtype = product.dtype;
        a.dtype = out.dtype;
        return a;
    }

    static Work work(const ScaleProductArguments& a) { return {a.product.count, a.product.width}; }  // rows
};

}  // namespace blip3o
