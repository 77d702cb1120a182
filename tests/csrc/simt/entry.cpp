// A CUDA kernel file as a library for the CPU: KERNEL_SOURCE is the .cu file, compiled against the headers in
// include/, and KERNEL_OP the op in it.
#include KERNEL_SOURCE

namespace {

using blip3o::cuda::LaunchScratch;

template <class Arguments>
void call(void (*op)(const Arguments&, cudaStream_t), const void* arguments, const LaunchScratch&) {
    op(*static_cast<const Arguments*>(arguments), nullptr);
}

template <class Arguments>
void call(void (*op)(const Arguments&, const LaunchScratch&, cudaStream_t), const void* arguments,
          const LaunchScratch& scratch) {
    op(*static_cast<const Arguments*>(arguments), scratch, nullptr);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void simt_set_descending(bool descending) { simt::Block::descending = descending; }

EXPORT void simt_set_multiprocessors(int count) { simt::multiprocessors = count; }

EXPORT void simt_set_shared_memory(int bytes) { simt::shared_memory = bytes; }

EXPORT void simt_set_ptx_version(int version) { simt::ptx_version = version; }

EXPORT void simt_set_dependent_launches(bool on) {
    using blip3o::cuda::Launches;
    blip3o::cuda::launches = on ? Launches::first_of_chain : Launches::ordinary;
}

EXPORT int simt_dependent_launches() { return simt::dependent_launches; }

EXPORT void simt_set_produced(const std::pair<uintptr_t, size_t>* memory, size_t count) {
    simt::produced.clear();
    for (size_t i = 0; i < count; ++i) {
        simt::produced.push_back({reinterpret_cast<unsigned char*>(memory[i].first), memory[i].second, {}});
    }
}

EXPORT void simt_call(const void* arguments, const void* scratch) {
    call(blip3o::cuda::KERNEL_OP, arguments, *static_cast<const LaunchScratch*>(scratch));
}
