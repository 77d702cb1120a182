// Arguments of add_pixel_shuffle and add_pixel_unshuffle.
#pragma once

#include "blip3o/op.h"

namespace blip3o {

// A coarse image [batch, height, width, coarse_channels], and a fine one of twice its height and width.
struct PixelShuffleArguments {
    void* result;
    const void *x, *bias;
    int64_t batch, height, width, coarse_channels, fine_channels;
    DType dtype;
};

// up: x is the coarse image and result the fine one; else the other way round.
inline PixelShuffleArguments check_pixel_shuffle(const char* op, Device device, bool up,
                                                 const TensorView& result, const TensorView& x,
                                                 const OptionalView& bias) {
    Contract contract(op, device);
    Dim batch("B"), height("H"), width("W"), tall("2 H"), wide("2 W"), narrow("C"), deep("D");
    Dim &rows = up ? tall : height, &columns = up ? wide : width;
    Dim &x_rows = up ? height : tall, &x_columns = up ? width : wide;
    PixelShuffleArguments a;
    a.dtype = result.dtype;
    a.result =
        contract(result, "result").dtype(kFloats).array(result.dtype, {&batch, &rows, &columns, &narrow});
    a.x = contract(x, "x").array(result.dtype, {&batch, &x_rows, &x_columns, &deep});
    a.bias = contract(bias, "bias").array(result.dtype, {&narrow});
    contract.require(tall.value() == 2 * height.value() && wide.value() == 2 * width.value(),
                     "one image must have twice the height and width of the other");
    a.batch = batch.value();
    a.height = height.value();
    a.width = width.value();
    a.coarse_channels = up ? deep.value() : narrow.value();
    a.fine_channels = up ? narrow.value() : deep.value();
    contract.require(a.coarse_channels > 0 && 4 * a.fine_channels % a.coarse_channels == 0,
                     "4 times the channels of the larger image must be a multiple of the smaller one's");
    return a;
}

// Rows of the coarse images.
inline Work pixel_shuffle_work(const PixelShuffleArguments& a) {
    return {a.width > 0 ? a.batch * a.height : 0, a.width * 4 * a.fine_channels};
}

}  // namespace blip3o
