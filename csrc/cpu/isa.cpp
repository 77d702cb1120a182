#include <atomic>

#include "cpu/kernels.h"

namespace blip3o::cpu {

namespace portable {
extern const Kernels kKernels;
}
#if defined(BLIP3O_X86_KERNELS)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

Isa best_isa() {
    if (runs_here(Isa::avx512)) return Isa::avx512;
    return runs_here(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

const char* name_of(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

bool runs_here(Isa isa) {
    if (isa == Isa::portable) return true;
#if defined(BLIP3O_X86_KERNELS)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

bool has_bf16_products() {
#if defined(BLIP3O_X86_KERNELS)
    return current_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

Isa current_isa() { return chosen().load(); }

void set_isa(Isa isa) { chosen().store(isa); }

const Kernels& kernels() {
#if defined(BLIP3O_X86_KERNELS)
    switch (current_isa()) {
        case Isa::avx512:
            return avx512::kKernels;
        case Isa::avx2:
            return avx2::kKernels;
        case Isa::portable:
            break;
    }
#endif
    return portable::kKernels;
}

}  // namespace blip3o::cpu
