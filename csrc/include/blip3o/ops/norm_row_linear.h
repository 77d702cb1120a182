// rms_norm, then row_linear, then silu_mul where the weight is gated.
#pragma once

#include "blip3o/row_product.h"

namespace blip3o {

struct NormRowLinear {
    static constexpr char kName[] = "norm_row_linear";
    static constexpr char kParameters[] =
        "x, norm_weight, eps, weight, *, scale=None, gated=False, scratch=None, out";

    static RowProductArguments check(Device device, const TensorView& x, const TensorView& norm_weight,
                                     double eps, const TensorView& weight, const OptionalView& scale,
                                     bool gated, const Scratch&, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("M"), inputs("K"), weight_rows(gated ? "2 N" : "N"), outputs("N");
        auto a = check_row_product(contract, device, x, weight, scale, rows, inputs, weight_rows);
        a.norm_weight = contract(norm_weight, "norm_weight").array(x.dtype, {&inputs});
        a.out = contract(out, "out").dtype({x.dtype}).rows(rows, outputs);
        contract.require(weight_rows.value() == (gated ? 2 : 1) * outputs.value(),
                         gated ? "weight must have a gate row and an up row for each column of out"
                               : "weight must have a row for each column of out");
        contract.require_apart(a.out, "out", a.x, "x");
        a.eps = static_cast<float>(eps);
        a.gated = gated;
        return a;
    }

    // Every block of the CUDA kernel norms all rows.
    static void check_few_rows(const RowProductArguments& a) {
        Contract(kName, Device::cuda)
            .require(a.dtype == DType::bf16 && a.x.count <= 8,
                     "this kernel takes up to 8 rows of bfloat16; call rms_norm and row_linear for more");
    }
};

}  // namespace blip3o
