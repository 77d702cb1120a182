// The part of the CUDA runtime that kernels and their launches use, on the CPU (see simt.h).
#pragma once

#include "simt.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaFuncAttributes {
    int ptxVersion;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

namespace simt {

inline int multiprocessors = 3;  // few, so that blocks of a small test have more than one piece of work
inline int shared_memory = 227 * 1024;
inline size_t allowed_shared_memory = 0;  // of the kernel that asked last
inline int ptx_version = 90;              // that kernels are compiled from
inline int dependent_launches = 0;        // so far

}  // namespace simt

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
    *value = name == cudaDevAttrMultiProcessorCount ? simt::multiprocessors : simt::shared_memory;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    simt::allowed_shared_memory = static_cast<size_t>(bytes);
    return bytes <= simt::shared_memory ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    attributes->ptxVersion = simt::ptx_version;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const dim3 block = config->blockDim;
    const unsigned threads = block.x * block.y * block.z;
    const dim3 grid = config->gridDim;
    const size_t dynamic = config->dynamicSmemBytes;
    if (dynamic > 48 * 1024 && dynamic > simt::allowed_shared_memory) return cudaErrorInvalidConfiguration;
    const bool empty = threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0;
    if (empty || threads > 1024 || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    const bool early = config->numAttrs > 0 && config->attrs->val.programmaticStreamSerializationAllowed != 0;
    simt::dependent_launches += early;
    simt::run_grid(grid, block, dynamic, early, [&] { kernel(arguments...); });
    return cudaSuccess;
}
