// The activation of a gated MLP, the same bits wherever it is computed.
#pragma once

#include <cuda_runtime.h>

namespace blip3o::cuda {

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace blip3o::cuda
