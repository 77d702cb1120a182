// Values combined over the lanes of a warp, always in the same order.
#pragma once

#include <cstdint>

namespace blip3o::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The sum over groups of kLanes neighboring lanes, for each of them.
template <int kLanes = kWarp>
__device__ inline float sum_over_lanes(float value) {
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, distance);
    }
    return value;
}

// The same of several values, whose exchanges are on the way together.
template <int kLanes, int kCount>
__device__ inline void sum_over_lanes(float (&values)[kCount]) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], distance);
    }
}

}  // namespace blip3o::cuda
