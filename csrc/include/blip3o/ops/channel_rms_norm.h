// RMSNorm over channels, plus a residual, then ReLU.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct ChannelRmsNormArguments {
    Rows x, residual, out;
    const void *weight, *bias;
    DType dtype;
    float eps;
    bool relu;
};

struct ChannelRmsNorm {
    static constexpr char kName[] = "channel_rms_norm";
    static constexpr char kParameters[] = "x, weight, bias, eps, *, residual=None, relu=False, out";

    static ChannelRmsNormArguments check(Device device, const TensorView& x, const TensorView& weight,
                                         const TensorView& bias, double eps, const OptionalView& residual,
                                         bool relu, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("rows"), width("C");
        ChannelRmsNormArguments a;
        a.dtype = x.dtype;
        a.x = contract(x, "x").dtype(kFloats).rows(rows, width);
        a.weight = contract(weight, "weight").array(x.dtype, {&width});
        a.bias = contract(bias, "bias").array(x.dtype, {&width});
        a.residual = contract(residual, "residual").dtype({x.dtype}).rows(rows, width);
        a.out = contract(out, "out").dtype({x.dtype}).rows(rows, width);
        a.eps = static_cast<float>(eps);
        a.relu = relu;
        return a;
    }

    static Work work(const ChannelRmsNormArguments& a) { return {a.x.count, a.x.width}; }  // pixels
};

}  // namespace blip3o
