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

// Of a block, beside its static shared memory.
struct DynamicSharedMemory {
    size_t bytes;
};

// One launch of `kernel` on `stream`; returns before it has run.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, DynamicSharedMemory memory,
            cudaStream_t stream, const Arguments&... arguments) {
    if (memory.bytes > 0) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(memory.bytes)),
              "cudaFuncSetAttribute");
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = memory.bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
            const Arguments&... arguments) {
    launch(kernel, grid, block, DynamicSharedMemory{0}, stream, arguments...);
}

// A number that the current device has. It does not touch the stream, so a graph capture may be under way.
inline int attribute(cudaDeviceAttr name) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Bytes that a block may have at most, static and dynamic.
inline size_t shared_memory_per_block() {
    return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

}  // namespace blip3o::cuda
