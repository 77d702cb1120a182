// Bias, SiLU, depthwise 3x3 convolution, bias and gate, channels last.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

constexpr int64_t kDepthwiseGluChannels = 16;  // in a unit of work

struct DepthwiseGluArguments {
    Rows x, out;  // rows are the pixels of all images
    const void *input_bias, *weight, *bias;
    int64_t batch, height, width, channels;  // channels of the result
    DType dtype;
};

struct DepthwiseGlu {
    static constexpr char kName[] = "depthwise_glu";
    static constexpr char kParameters[] = "x, input_bias, weight, bias, *, out";

    static DepthwiseGluArguments check(Device device, const TensorView& x, const TensorView& input_bias,
                                       const TensorView& weight, const TensorView& bias,
                                       const TensorView& out) {
        Contract contract(kName, device);
        Dim batch("B"), height("H"), width("W"), doubled("2 C"), channels("C"), one("1"), taps("3"),
            rows("B H W");
        DepthwiseGluArguments a;
        a.dtype = x.dtype;
        a.x = contract(x, "x").dtype(kFloats).shape({&batch, &height, &width, &doubled}).rows(rows, doubled);
        a.input_bias = contract(input_bias, "input_bias").array(x.dtype, {&doubled});
        a.weight = contract(weight, "weight").array(x.dtype, {&doubled, &one, &taps, &taps});
        a.bias = contract(bias, "bias").array(x.dtype, {&doubled});
        a.out = contract(out, "out")
                    .dtype({x.dtype})
                    .shape({&batch, &height, &width, &channels})
                    .rows(rows, channels);
        contract.require(doubled.value() == 2 * channels.value(), "x must be twice as wide as out");
        contract.require(one.value() == 1 && taps.value() == 3, "weight must be [2 C, 1, 3, 3]");
        contract.require_apart(a.out, "out", a.x, "x");
        a.batch = batch.value();
        a.height = height.value();
        a.width = width.value();
        a.channels = channels.value();
        return a;
    }

    // (image, block of channels) pairs.
    static Work work(const DepthwiseGluArguments& a) {
        const int64_t pixels = a.height * a.width;
        return {pixels > 0 ? a.batch * ceil_divide(a.channels, kDepthwiseGluChannels) : 0,
                pixels * kDepthwiseGluChannels * 16};
    }
};

}  // namespace blip3o
