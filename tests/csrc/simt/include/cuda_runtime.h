// The part of the CUDA runtime that kernels and their launches use, on the CPU (see simt.h).
#pragma once

#include "simt.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const dim3 block = config->blockDim;
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
    simt::run_grid(config->gridDim, block, [&] { kernel(arguments...); });
    return cudaSuccess;
}
