// silu(gate) * up over rows (gate | up).
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct SiluMulArguments {
    Rows gate_up, out;
    DType dtype;
};

struct SiluMul {
    static constexpr char kName[] = "silu_mul";
    static constexpr char kParameters[] = "gate_up, *, out";

    static SiluMulArguments check(Device device, const TensorView& gate_up, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("M"), doubled("2 I"), width("I");
        SiluMulArguments a;
        a.dtype = gate_up.dtype;
        a.gate_up = contract(gate_up, "gate_up").dtype(kFloats).rows(rows, doubled);
        a.out = contract(out, "out").dtype({gate_up.dtype}).rows(rows, width);
        contract.require(doubled.value() == 2 * width.value(), "gate_up must be twice as wide as out");
        return a;
    }

    static Work work(const SiluMulArguments& a) { return {a.out.count, 4 * a.out.width}; }  // rows
};

}  // namespace blip3o
