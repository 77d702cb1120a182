// values weight^T of 8-bit integers, exact in 32 bits.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

constexpr int64_t kIntegerColumns = 16;  // of the result in a unit of work

struct IntegerProductArguments {
    Rows values, weight, out;
};

struct IntegerProduct {
    static constexpr char kName[] = "integer_product";
    static constexpr char kParameters[] = "values, weight, *, out";

    static IntegerProductArguments check(Device device, const TensorView& values, const TensorView& weight,
                                         const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("M"), inputs("K"), outputs("N");
        IntegerProductArguments a;
        a.values = contract(values, "values").dtype({DType::i8}).rows(rows, inputs);
        a.weight = contract(weight, "weight").dtype({DType::i8}).rows(outputs, inputs);
        a.out = contract(out, "out").dtype({DType::i32}).rows(rows, outputs);
        return a;
    }

    static Work work(const IntegerProductArguments& a) {
        return {a.values.count > 0 ? ceil_divide(a.weight.count, kIntegerColumns) : 0,
                a.values.width * a.values.count * kIntegerColumns};
    }
};

}  // namespace blip3o
