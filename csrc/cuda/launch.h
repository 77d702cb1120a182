// Starts kernels from plain C++: compiles under nvcc, and under g++ for tests that run kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace blip3o::cuda {

// Throws std::runtime_error with CUDA's own words unless `error` is cudaSuccess.
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// One launch of `kernel` on `stream`; returns before it has run.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
            const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

// Multiprocessors of the current device. It does not touch the stream, so a graph capture may be under way.
inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

}  // namespace blip3o::cuda
