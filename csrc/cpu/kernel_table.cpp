// The kernels of one instruction set as a table.
#include "cpu/kernels.h"

namespace blip3o::cpu::BLIP3O_ISA {

#define OP(function, Op) void function(const ArgumentsOf<Op>&, int64_t begin, int64_t end);
#define KERNEL(function, Arguments) void function(const Arguments&, int64_t begin, int64_t end);
#include "cpu/kernels.inc"

extern const Kernels kKernels;
const Kernels kKernels = {
#define OP(function, Op) function,
#define KERNEL(function, Arguments) function,
#include "cpu/kernels.inc"
};

}  // namespace blip3o::cpu::BLIP3O_ISA
