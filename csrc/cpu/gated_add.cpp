// residual += gate * x over rows, rounded once. Memory bound: two elements in and one out for one
// multiply-add.
#include "blip3o/ops/gated_add.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

template <class T, class Gate>
void add_rows(const GatedAddArguments& a, int64_t begin, int64_t end) {
    const auto* gate = static_cast<const Gate*>(a.gate);
    for (int64_t row = begin; row < end; ++row) {
        T* residual = a.residual.row<T>(row);
        const T* x = a.x.row<T>(row);
        for_each_vector(a.x.width, [&](int64_t i, int64_t count) {
            store(residual + i, load(residual + i, count) + load(gate + i, count) * load(x + i, count),
                  count);
        });
    }
}

}  // namespace

void gated_add(const GatedAddArguments& arguments, int64_t begin, int64_t end) {
    if (arguments.dtype != DType::bf16) {
        add_rows<float, float>(arguments, begin, end);
    } else if (arguments.gate_dtype == DType::bf16) {
        add_rows<bf16, bf16>(arguments, begin, end);
    } else {
        add_rows<bf16, float>(arguments, begin, end);
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
