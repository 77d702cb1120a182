// x weight^T + bias for many rows and a bfloat16 weight.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

constexpr int64_t kLinearColumns = 16;  // of the result in a unit of work

struct LinearArguments {
    Rows x, weight, out;
    const float* scale;         // one for each row of weight; may be null
    const void* bias;           // may be null
    DType dtype, weight_dtype;  // of x, bias and out, and of weight
    bool pair_products;         // whether the machine has the instruction, and may use it
};

inline LinearArguments check_linear(const char* op, Device device, const TensorView& x,
                                    const TensorView& weight, DType weight_dtype, const OptionalView& scale,
                                    const OptionalView& bias, const TensorView& out) {
    Contract contract(op, device);
    Dim rows("M"), inputs("K"), outputs("N");
    LinearArguments a;
    a.x = contract(x, "x").dtype(kFloats).rows(rows, inputs);
    a.weight = contract(weight, "weight").dtype({weight_dtype}).rows(outputs, inputs);
    a.scale = contract(scale, "scale").array<float>({&outputs});
    a.bias = contract(bias, "bias").array(x.dtype, {&outputs});
    a.out = contract(out, "out").dtype({x.dtype}).rows(rows, outputs);
    contract.require(x.dtype == DType::f32 || inputs.value() % 2 == 0,
                     "K must be even: steps are multiplied in pairs");
    contract.require_apart(a.out, "out", a.x, "x");
    a.dtype = x.dtype;
    a.weight_dtype = weight_dtype;
    a.pair_products = false;
    return a;
}

struct Linear {
    static constexpr char kName[] = "linear";
    static constexpr char kParameters[] = "x, weight, bias=None, *, out";

    static LinearArguments check(Device device, const TensorView& x, const TensorView& weight,
                                 const OptionalView& bias, const TensorView& out) {
        return check_linear(kName, device, x, weight, DType::bf16, {}, bias, out);
    }

    static Work work(const LinearArguments& a) {
        return {a.x.count > 0 ? ceil_divide(a.weight.count, kLinearColumns) : 0,
                a.x.width * a.x.count * kLinearColumns};
    }
};

}  // namespace blip3o
