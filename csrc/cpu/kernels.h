// The CPU kernels as every instruction set offers them, and the choice between
// those at run time.
//
// Each csrc/cpu/<op>.cpp is compiled once per instruction set into a namespace
// of its own. Such a file must not instantiate anything of the standard
// library: the linker keeps one copy of an inline function, and it might be the
// AVX-512 one that then runs on a machine without it.
#pragma once

#include "cpu/kernels.inc"

namespace blip3o::cpu {

// A kernel computes the units begin .. end of its op's work.
template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

template <class Arguments, class... Parameters>
Arguments arguments_of(Arguments (*check)(Parameters...));

// What the kernels of an op receive.
template <class Op>
using ArgumentsOf = decltype(arguments_of(&Op::check));

struct Kernels {
#define OP(function, Op) Kernel<ArgumentsOf<Op>> function;
#define KERNEL(function, Arguments) Kernel<Arguments> function;
#include "cpu/kernels.inc"
};

enum class Isa { portable, avx2, avx512 };
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};

const char* name_of(Isa isa);

// Whether this build has the kernels of `isa` and this machine runs them.
bool runs_here(Isa isa);

// Whether the kernels in use multiply pairs of bfloat16 in one instruction
// (AVX512_BF16).
bool has_bf16_products();

// The instruction set in use: the best that runs here, until set_isa says
// otherwise.
Isa current_isa();

// `isa` must run here.
void set_isa(Isa isa);

const Kernels& kernels();

}  // namespace blip3o::cpu
