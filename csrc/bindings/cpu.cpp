// Module blip3o_rt._cpu: the CPU ops on torch tensors, and the settings of their threads and instruction set.
#include <string>
#include <vector>

#include "blip3o/philox.h"
#include "cpu/launch.h"
#include "define_op.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

namespace blip3o::bindings {
namespace {

// Defines an op as a function of the module.
struct Define {
    py::module_& module;

    template <class Op, class Launch>
    void add(const Launch& launch) {
        module.def(Op::kName, checked(&Op::check, Device::cpu, launch), Parameters(Op::kParameters),
                   py::call_guard<py::gil_scoped_release>());
    }
};

std::vector<std::string> isas_here() {
    std::vector<std::string> names;
    for (cpu::Isa isa : cpu::kIsas) {
        if (cpu::runs_here(isa)) names.emplace_back(cpu::name_of(isa));
    }
    return names;
}

void set_isa(const std::string& name) {
    std::string accepted;
    for (cpu::Isa isa : cpu::kIsas) {
        if (!cpu::runs_here(isa)) continue;
        if (name == cpu::name_of(isa)) return cpu::set_isa(isa);
        accepted += (accepted.empty() ? "" : ", ") + std::string(cpu::name_of(isa));
    }
    throw ArgumentError("instruction set '" + name +
                        "' is unknown or not in this machine; accepted: " + accepted);
}

std::vector<uint32_t> philox(uint64_t seed, uint32_t stream, uint32_t position, uint64_t count) {
    std::vector<uint32_t> numbers(count);
    for (uint64_t i = 0; i < count; ++i) {
        numbers[i] = philox_block(seed, static_cast<Stream>(stream), position, i / 4).word[i % 4];
    }
    return numbers;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "CPU kernels of blip3o_rt; the contracts are in blip3o_rt.ops";
    translate_argument_errors();
    const py::call_guard<py::gil_scoped_release> no_gil;
    Define define{module};
    cpu::for_each_op(define);

    module.def("num_threads", &cpu::num_threads, "Threads that share the work of an op.");
    module.def("set_num_threads", &cpu::set_num_threads, "threads"_a, no_gil);
    module.def(
        "isa", [] { return cpu::name_of(cpu::current_isa()); }, "Instruction set of the kernels in use.");
    module.def("isas", &isas_here, "Instruction sets that this build has and this machine runs.");
    module.def("has_bf16_products", &cpu::has_bf16_products,
               "Whether the kernels in use multiply pairs of bfloat16 in one instruction (AVX512_BF16).");
    module.def("set_isa", &set_isa, "name"_a);
    module.def("philox", &philox, "seed"_a, "stream"_a, "position"_a, "count"_a,
               "The first `count` numbers of a stream, as blip3o_rt.ops.random.philox_uint32.");
}

}  // namespace blip3o::bindings
