// What a header of blip3o/ops says of an op: the arguments of its kernels (plain pointers and sizes, checked), and a
// struct with these static members.
//
//     kName, kParameters    name and parameters, as in blip3o_rt/ops
//     check(device, ...)    arguments in the order of kParameters -> those of the kernels, or ArgumentError
//     check_values(a)       optional: checks what only a CPU op can read, the values in tensors
//     work(a)               of an op with a kernel in csrc/cpu: how its work is divided
//
// Kernel files of several instruction sets include these headers, so they must not call any function defined in
// them that is not always inlined (cpu/kernels.h).
#pragma once

#include "blip3o/tensor_view.h"

namespace blip3o {

// `units` pieces of work of about `elements` elements or operations each.
struct Work {
    int64_t units, elements;
};

// An argument that no native implementation reads: any object.
struct Unused {};

// Memory of the caller that a call may use: for CUDA kernels of the sizes in cuda/workspaces.h. CPU kernels need
// none and ignore it.
struct Scratch {
    TensorView memory, counters;  // counters: zeros, left as zeros
};

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace blip3o
