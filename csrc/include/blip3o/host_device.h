// Marks functions that both the host and CUDA kernels call.
#pragma once

#if defined(__CUDACC__)
#define BLIP3O_HOST_DEVICE __host__ __device__
#else
#define BLIP3O_HOST_DEVICE __attribute__((always_inline))  // no copy stays in a file of other instructions
#endif
