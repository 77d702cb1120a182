// Rows as int8 multiples of a scale for each row.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

struct QuantizeRowsArguments {
    Rows x, out;
    float* scale;  // one for each row
    DType dtype;
};

struct QuantizeRows {
    static constexpr char kName[] = "quantize_rows";
    static constexpr char kParameters[] = "x, scale, *, dtype=None, out";  // dtype: that of out

    static QuantizeRowsArguments check(Device device, const TensorView& x, const TensorView& scale, Unused,
                                       const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("M"), width("K");
        QuantizeRowsArguments a;
        a.dtype = x.dtype;
        a.x = contract(x, "x").dtype(kFloats).rows(rows, width);
        a.scale = contract(scale, "scale").array<float>({&rows});
        a.out = contract(out, "out").dtype({DType::i8}).rows(rows, width);
        return a;
    }

    static Work work(const QuantizeRowsArguments& a) { return {a.x.count, a.x.width}; }  // rows
};

}  // namespace blip3o
