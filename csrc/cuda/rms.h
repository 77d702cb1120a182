// How the root mean square of a row is summed: by 256 threads, each warp by shuffles and then warp after warp,
// so that every kernel that norms gives the same bits.
#pragma once

#include <cstdint>

#include "cuda/warp.h"

namespace blip3o::cuda {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / kWarp;

// Of a row so wide, from the sums of squares of each warp.
__device__ inline float inverse_rms(const float (&warp_sums)[kNormWarps], int64_t width, float eps) {
    float sum = 0.0f;
    for (int warp = 0; warp < kNormWarps; ++warp) sum += warp_sums[warp];
    return 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
}

}  // namespace blip3o::cuda
