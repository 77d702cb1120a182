// residual += x, then y / sqrt(mean(y^2) + eps) * weight + bias.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct RmsNormArguments {
    Rows x, residual, out;
    const void *weight, *bias;  // bias may be null
    DType dtype;
    float eps;
    Rows kept = {};  // of rms_norm_keep
    const int64_t* slots = nullptr;
};

struct RmsNorm {
    static constexpr char kName[] = "rms_norm";
    static constexpr char kParameters[] = "x, weight, eps, *, bias=None, residual=None, out";

    static RmsNormArguments check(Device device, const TensorView& x, const TensorView& weight, double eps,
                                  const OptionalView& bias, const OptionalView& residual,
                                  const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("rows"), width("D");
        RmsNormArguments a;
        a.dtype = x.dtype;
        a.x = contract(x, "x").dtype(kFloats).rows(rows, width);
        a.weight = contract(weight, "weight").array(x.dtype, {&width});
        a.bias = contract(bias, "bias").array(x.dtype, {&width});
        a.residual = contract(residual, "residual").dtype({x.dtype}).rows(rows, width);
        a.out = contract(out, "out").dtype({x.dtype}).rows(rows, width);
        a.eps = static_cast<float>(eps);
        return a;
    }

    static Work work(const RmsNormArguments& a) { return {a.x.count, a.x.width}; }  // rows
};

}  // namespace blip3o
