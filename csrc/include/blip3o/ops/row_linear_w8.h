// (x weight^T) scale + bias for a few rows and an 8-bit weight.
#pragma once

#include "blip3o/row_product.h"

namespace blip3o {

struct RowLinearW8 {
    static constexpr char kName[] = "row_linear_w8";
    static constexpr char kParameters[] = "x, weight, scale, *, bias=None, out";

    static RowProductArguments check(Device device, const TensorView& x, const TensorView& weight,
                                     const TensorView& scale, const OptionalView& bias,
                                     const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("M"), inputs("K"), outputs("N");
        auto a = check_row_product(contract, device, x, weight, scale, rows, inputs, outputs);
        a.bias = contract(bias, "bias").array(x.dtype, {&outputs});
        a.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, outputs);
        a.out_dtype = out.dtype;
        contract.require_apart(a.out, "out", a.x, "x");
        return a;
    }

    static void check_values(const RowProductArguments& a) {
        Contract(kName, Device::cpu)
            .require(a.weight_dtype == DType::i8, "the CPU kernel takes an int8 weight, not one of e4m3");
    }

    static Work work(const RowProductArguments& a) { return row_product_work(a); }
};

}  // namespace blip3o
