// RMSNorm and rotary embedding of one head.
#pragma once

#include "cuda/convert.h"
#include "cuda/warp.h"

namespace blip3o::cuda {

constexpr int kRotatedPack = 2;  // pairs of channels per lane and step: one step for 128 channels

// to = rope(rms_norm(from)) for one head by one warp; `rotation` = (cos | sin).
template <class T, int kPack>
__device__ void norm_and_rotate(T* to, const T* from, const T* weight, const float* rotation, int size,
                                float eps) {
    const int half = size / 2, first = threadIdx.x % kWarp * kPack, step = kWarp * kPack;
    float squares = 0.0f;
    for (int i = first; i < half; i += step) {
        const auto a = load_pack<T, kPack>(from + i), b = load_pack<T, kPack>(from + half + i);
        for (int e = 0; e < kPack; ++e) {
            squares += to_float(a.element[e]) * to_float(a.element[e]);
            squares += to_float(b.element[e]) * to_float(b.element[e]);
        }
    }
    const float scale = 1.0f / sqrtf(sum_over_lanes(squares) / static_cast<float>(size) + eps);
    for (int i = first; i < half; i += step) {
        const auto x = load_pack<T, kPack>(from + i), y = load_pack<T, kPack>(from + half + i);
        const auto x_weight = load_pack<T, kPack>(weight + i),
                   y_weight = load_pack<T, kPack>(weight + half + i);
        const auto cosine = load_pack<float, kPack>(rotation + i);
        const auto sine = load_pack<float, kPack>(rotation + half + i);
        Pack<T, kPack> low, high;
        for (int e = 0; e < kPack; ++e) {
            const float a = to_float(x.element[e]) * scale * to_float(x_weight.element[e]);
            const float b = to_float(y.element[e]) * scale * to_float(y_weight.element[e]);
            low.element[e] = from_float<T>(a * cosine.element[e] - b * sine.element[e]);
            high.element[e] = from_float<T>(b * cosine.element[e] + a * sine.element[e]);
        }
        store_pack(to + i, low);
        store_pack(to + half + i, high);
    }
}

}  // namespace blip3o::cuda
