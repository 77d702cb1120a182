// Copies from global to shared memory that a thread starts and waits for later (cp.async).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace blip3o::cuda {

// Under g++, in tests, cuda_runtime.h stands in with functions of the same names.
#if defined(__CUDACC__)
// What a launch gives each block beside its static shared memory.
__device__ inline void* dynamic_shared_memory() {
    extern __shared__ uint4 dynamic[];
    return dynamic;
}

// Starts to copy 16 bytes that no kernel writes meanwhile; writes zeros, and reads nothing, unless `condition`.
__device__ inline void copy_async(void* to, const void* from, bool condition) {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(condition ? 16 : 0)
                 : "memory");
#endif
}

// The copies that this thread has started since the last call are one group.
__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until this thread can read the copies of all its groups but the last kPending.
template <int kPending>
__device__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
#endif

}  // namespace blip3o::cuda
