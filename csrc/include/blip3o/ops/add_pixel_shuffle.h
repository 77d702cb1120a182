// result += bias + pixel_shuffle(x, channels repeated), channels last.
#pragma once

#include "blip3o/pixel_shuffle.h"

namespace blip3o {

struct AddPixelShuffle {
    static constexpr char kName[] = "add_pixel_shuffle";
    static constexpr char kParameters[] = "result, x, *, bias=None";

    static PixelShuffleArguments check(Device device, const TensorView& result, const TensorView& x,
                                       const OptionalView& bias) {
        return check_pixel_shuffle(kName, device, true, result, x, bias);
    }

    static Work work(const PixelShuffleArguments& a) { return pixel_shuffle_work(a); }
};

}  // namespace blip3o
