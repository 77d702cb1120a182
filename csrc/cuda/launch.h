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

// How this thread launches kernels: each when the one before it on its stream is over, or as early as that kernel
// lets it begin (dependent_launch.h), but for the first of a chain.
enum class Launches { ordinary, first_of_chain, dependent };
inline thread_local Launches launches = Launches::ordinary;

constexpr int kWaitingArchitecture = 90;  // code for older ones does not wait for the kernel before it

template <class... Parameters>
bool waits_itself(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return attributes.ptxVersion >= kWaitingArchitecture;
}

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
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = launches == Launches::dependent && waits_itself(kernel) ? 1 : 0;
    if (launches == Launches::first_of_chain) launches = Launches::dependent;
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
