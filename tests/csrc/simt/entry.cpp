// A CUDA kernel file as a library for the CPU: KERNEL_SOURCE is the .cu file, compiled against the headers in
// include/.
#include KERNEL_SOURCE

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void simt_set_descending(bool descending) { simt::Block::descending = descending; }

EXPORT void simt_rms_norm(const blip3o::RmsNormArguments& arguments) {
    blip3o::cuda::rms_norm(arguments, nullptr);
}
