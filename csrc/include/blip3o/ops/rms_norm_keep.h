// x / sqrt(mean(x^2) + eps) * weight, which is written twice: kept[slots[row]] receives it too.
#pragma once

#include "blip3o/ops/rms_norm.h"

namespace blip3o {

struct RmsNormKeep {
    static constexpr char kName[] = "rms_norm_keep";
    static constexpr char kParameters[] = "x, weight, eps, slots, kept, *, out";

    static RmsNormArguments check(Device device, const TensorView& x, const TensorView& weight, double eps,
                                  const TensorView& slots, const TensorView& kept, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("R"), width("D"), num_slots("N");
        RmsNormArguments a = {};
        a.dtype = x.dtype;
        a.x = contract(x, "x").dtype(kFloats).shape({&rows, &width}).rows(rows, width);
        a.weight = contract(weight, "weight").array(x.dtype, {&width});
        a.slots = contract(slots, "slots").array<int64_t>({&rows});
        a.kept = contract(kept, "kept").dtype({x.dtype}).shape({&num_slots, &width}).rows(num_slots, width);
        a.out = contract(out, "out").dtype({x.dtype}).shape({&rows, &width}).rows(rows, width);
        a.eps = static_cast<float>(eps);
        return a;
    }
};

}  // namespace blip3o
