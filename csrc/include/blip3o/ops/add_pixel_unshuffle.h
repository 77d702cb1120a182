// result += bias + pixel_unshuffle(x), channels averaged, channels last.
#pragma once

#include "blip3o/pixel_shuffle.h"

namespace blip3o {

struct AddPixelUnshuffle {
    static constexpr char kName[] = "add_pixel_unshuffle";
    static constexpr char kParameters[] = "result, x, *, bias=None";

    static PixelShuffleArguments check(Device device, const TensorView& result, const TensorView& x,
                                       const OptionalView& bias) {
        return check_pixel_shuffle(kName, device, false, result, x, bias);
    }

    static Work work(const PixelShuffleArguments& a) { return pixel_shuffle_work(a); }
};

}  // namespace blip3o
