// LayerNorm without weights, times 1 + scale, plus shift.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct LayerNormModulateArguments {
    Rows x, out;
    const void *shift, *scale;
    DType dtype, modulation_dtype, out_dtype;
    float eps;
};

struct LayerNormModulate {
    static constexpr char kName[] = "layer_norm_modulate";
    static constexpr char kParameters[] = "x, shift, scale, eps, *, out";

    static LayerNormModulateArguments check(Device device, const TensorView& x, const TensorView& shift,
                                            const TensorView& scale, double eps, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("rows"), width("D");
        LayerNormModulateArguments a;
        a.dtype = x.dtype;
        a.x = contract(x, "x").dtype(kFloats).rows(rows, width);
        a.shift = contract(shift, "shift").dtype({DType::f32, x.dtype}).array(shift.dtype, {&width});
        a.scale = contract(scale, "scale").array(shift.dtype, {&width});
        a.out = contract(out, "out").dtype({x.dtype, DType::f32}).rows(rows, width);
        a.modulation_dtype = shift.dtype;
        a.out_dtype = out.dtype;
        a.eps = static_cast<float>(eps);
        return a;
    }

    static Work work(const LayerNormModulateArguments& a) { return {a.x.count, a.x.width}; }  // rows
};

}  // namespace blip3o
