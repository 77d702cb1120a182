// silu(gate) * up, elementwise over rows (gate | up). Memory bound.
#include "blip3o/ops/silu_mul.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class T>
void gate_rows(const SiluMulArguments& a, int64_t begin, int64_t end) {
    const int64_t width = a.out.width;
    for (int64_t row = begin; row < end; ++row) {
        const T* gate = a.gate_up.row<T>(row);
        T* out = a.out.row<T>(row);
        for_each_vector(width, [&](int64_t i, int64_t count) {
            store(out + i, silu(load(gate + i, count)) * load(gate + width + i, count), count);
        });
    }
}

}  // namespace

void silu_mul(const SiluMulArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? gate_rows<bf16>(arguments, begin, end)
                                   : gate_rows<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
