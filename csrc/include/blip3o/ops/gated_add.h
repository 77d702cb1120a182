// residual += gate * x.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct GatedAddArguments {
    Rows residual, x;
    const void* gate;
    DType dtype, gate_dtype;
};

struct GatedAdd {
    static constexpr char kName[] = "gated_add";
    static constexpr char kParameters[] = "residual, x, gate";

    static GatedAddArguments check(Device device, const TensorView& residual, const TensorView& x,
                                   const TensorView& gate) {
        Contract contract(kName, device);
        Dim rows("rows"), width("D");
        GatedAddArguments a;
        a.dtype = residual.dtype;
        a.residual = contract(residual, "residual").dtype(kFloats).rows(rows, width);
        a.x = contract(x, "x").dtype({residual.dtype}).rows(rows, width);
        a.gate = contract(gate, "gate").dtype({DType::f32, residual.dtype}).array(gate.dtype, {&width});
        a.gate_dtype = gate.dtype;
        return a;
    }

    static Work work(const GatedAddArguments& a) { return {a.x.count, a.x.width}; }  // rows
};

}  // namespace blip3o
