// residual += x weight^T for a few rows.
#pragma once

#include "blip3o/row_product.h"

namespace blip3o {

struct RowLinearAdd {
    static constexpr char kName[] = "row_linear_add";
    static constexpr char kParameters[] = "x, weight, residual, *, scale=None";

    static RowProductArguments check(Device device, const TensorView& x, const TensorView& weight,
                                     const TensorView& residual, const OptionalView& scale) {
        Contract contract(kName, device);
        Dim rows("M"), inputs("K"), outputs("N");
        auto a = check_row_product(contract, device, x, weight, scale, rows, inputs, outputs);
        a.out = contract(residual, "residual").dtype({x.dtype}).rows(rows, outputs);
        contract.require_apart(a.out, "residual", a.x, "x");
        a.adds = true;
        return a;
    }
};

}  // namespace blip3o
