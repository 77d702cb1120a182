// The last of several blocks to arrive goes on with what all of them have left in memory.
#pragma once

#include <cuda_runtime.h>

namespace blip3o::cuda {

// Adds one to the count, or sets it back from `last` to zero; what it was. Releases what the block's threads
// wrote before a barrier, and acquires what other blocks have released: one fence, and none of its own.
__device__ inline unsigned count_arrival(unsigned* arrived, unsigned last) {
#if defined(__CUDA_ARCH__)
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(arrived), "r"(last)
                 : "memory");
    return before;
#else
    return atomicInc(arrived, last);
#endif
}

// Whether this block is the last of `blocks` to come here; the count is zero again then. It reads what the
// others have left past the first-level cache (__ldcg).
__device__ inline bool is_last_to_arrive(unsigned* arrived, int blocks) {
    __shared__ bool last;
    const auto ticket = static_cast<unsigned>(blocks - 1);
    __syncthreads();
    if (threadIdx.x == 0) last = count_arrival(arrived, ticket) == ticket;
    __syncthreads();
    return last;
}

}  // namespace blip3o::cuda
