// What row_linear, row_linear_w8, norm_row_linear and row_linear_add have in common: products of a few rows with a
// weight.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

// An operand that is null or false is left out.
struct RowProductArguments {
    Rows x, weight, out;
    const float* scale;       // one for each row of weight
    const void* bias;         // [weight.count]
    const void* norm_weight;  // rows of x are normed first
    float eps;
    bool gated;  // rows of weight are gates and as many ups: silu(gate) * up
    bool adds;   // into out, which has the dtype of x
    DType dtype, weight_dtype, out_dtype;
};

// x, and a weight of its dtype, or of 8 bits with a scale for each row; the CPU kernels take a bfloat16 one too.
inline RowProductArguments check_row_product(Contract& contract, Device device, const TensorView& x,
                                             const TensorView& weight, const OptionalView& scale, Dim& rows,
                                             Dim& inputs, Dim& weight_rows) {
    RowProductArguments a = {};
    a.x = contract(x, "x").dtype(kFloats).rows(rows, inputs);
    if (scale) {
        contract(weight, "weight").dtype({DType::i8, DType::e4m3});
    } else if (x.dtype == DType::f32 && device == Device::cpu) {
        contract(weight, "weight").dtype(kFloats);
    } else {
        contract(weight, "weight").dtype({x.dtype});
    }
    a.weight = contract(weight, "weight").rows(weight_rows, inputs);
    a.scale = contract(scale, "scale").array<float>({&weight_rows});
    a.dtype = a.out_dtype = x.dtype;
    a.weight_dtype = weight.dtype;
    return a;
}

// Units of the CPU kernels: columns of the result.
inline Work row_product_work(const RowProductArguments& a) {
    return {a.x.count > 0 ? a.weight.count : 0, a.x.width * (a.x.count + 1)};
}

}  // namespace blip3o
