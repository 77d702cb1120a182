// (x weight^T) scale for many rows and an int8 weight.
#pragma once

#include "blip3o/ops/linear.h"

namespace blip3o {

struct LinearW8A16 {
    static constexpr char kName[] = "linear_w8a16";
    static constexpr char kParameters[] = "x, weight, scale, *, out";

    static LinearArguments check(Device device, const TensorView& x, const TensorView& weight,
                                 const TensorView& scale, const TensorView& out) {
        return check_linear(kName, device, x, weight, DType::i8, scale, {}, out);
    }
};

}  // namespace blip3o
