// Programmatic dependent launch: a kernel may begin while the one before it on the stream still runs (launch.h).
//
// Every thread of every kernel waits once, before it touches anything that a kernel writes. Before that it may read
// weights. The next kernel may begin when all blocks have waited: a kernel runs beside its neighbors alone.
#pragma once

#include <cuda_runtime.h>

namespace blip3o::cuda {

// Under g++, in tests, cuda_runtime.h stands in with a function of the same name.
#if defined(__CUDACC__)
// Waits until the kernel before is over and what it wrote can be read, by any load but a non-coherent one. Then
// lets the next kernel begin. Returns at once where the launch is an ordinary one.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // kWaitingArchitecture
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

}  // namespace blip3o::cuda
