// x weight^T + bias for a few rows.
#pragma once

#include "blip3o/row_product.h"

namespace blip3o {

struct RowLinear {
    static constexpr char kName[] = "row_linear";
    static constexpr char kParameters[] = "x, weight, *, bias=None, out";

    static RowProductArguments check(Device device, const TensorView& x, const TensorView& weight,
                                     const OptionalView& bias, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("M"), inputs("K"), outputs("N");
        auto a = check_row_product(contract, device, x, weight, {}, rows, inputs, outputs);
        a.bias = contract(bias, "bias").array(x.dtype, {&outputs});
        a.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, outputs);
        a.out_dtype = out.dtype;
        contract.require_apart(a.out, "out", a.x, "x");
        return a;
    }

    static Work work(const RowProductArguments& a) { return row_product_work(a); }
};

}  // namespace blip3o
