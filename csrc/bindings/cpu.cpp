// Module blip3o_rt._cpu: the CPU ops on torch tensors, and the settings of their threads and instruction set.
#include <type_traits>
#include <vector>

#include "blip3o/ops/linear_w8a16.h"
#include "blip3o/ops/norm_row_linear.h"
#include "blip3o/ops/row_linear_add.h"
#include "blip3o/ops/sample_tokens.h"
#include "blip3o/philox.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "define_op.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

namespace blip3o::cpu {

void sample_rows(const SampleTokensArguments& arguments, int64_t begin,
                 int64_t end);  // sample_tokens.cpp

}  // namespace blip3o::cpu

namespace blip3o::bindings {
namespace {

using cpu::kernels;

// Elements that one thread should have at least; less is done sooner than another thread wakes up.
constexpr int64_t kGrainElements = 16 * 1024;

template <class Arguments>
void run(cpu::Kernel<Arguments> kernel, const Arguments& arguments, Work work) {
    const int64_t grain = work.elements >= kGrainElements ? 1 : kGrainElements / (work.elements + 1) + 1;
    cpu::parallel_for(work.units, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

template <class Op, class = void>
struct ChecksValues : std::false_type {};
template <class Op>
struct ChecksValues<Op, std::void_t<decltype(&Op::check_values)>> : std::true_type {};

template <class Op>
void launch(cpu::Kernel<cpu::ArgumentsOf<Op>> kernel, const cpu::ArgumentsOf<Op>& arguments) {
    if constexpr (ChecksValues<Op>::value) Op::check_values(arguments);
    run(kernel, arguments, Op::work(arguments));
}

template <>
void launch<Linear>(cpu::Kernel<LinearArguments> kernel, const LinearArguments& arguments) {
    LinearArguments a = arguments;
    a.pair_products = cpu::has_bf16_products();
    run(kernel, a, Linear::work(a));
}

template <>
void launch<ReluLinearAttention>(cpu::Kernel<ReluLinearAttentionArguments> kernel,
                                 const ReluLinearAttentionArguments& arguments) {
    ReluLinearAttentionArguments a = arguments;
    const int64_t tokens = a.q_weight || a.k_weight ? a.qkv.count : 0;
    std::vector<float> inverse_rms(2 * tokens);
    a.inverse_rms = inverse_rms.data();
    run(kernels().relu_linear_attention_norms, a, {tokens, a.qkv.width});
    run(kernel, a, ReluLinearAttention::work(a));
}

template <>
void launch<CrossAttention>(cpu::Kernel<CrossAttentionArguments> kernel,
                            const CrossAttentionArguments& arguments) {
    CrossAttentionArguments a = arguments;
    const int64_t queries = a.query_weight ? a.query.count : 0;
    std::vector<float> inverse_rms(queries);
    a.inverse_rms = inverse_rms.data();
    a.pair_products = cpu::has_bf16_products();
    run(kernels().cross_attention_norms, a, {queries, a.query.width});
    run(kernel, a, CrossAttention::work(a));
}

void launch_row_product(const RowProductArguments& a) {
    a.scale ? launch<RowLinearW8>(kernels().row_linear_w8, a) : launch<RowLinear>(kernels().row_linear, a);
}

// A matrix between two kernels of an op, in memory that the calling thread keeps.
template <int kWhich>
Rows intermediate(int64_t rows, int64_t columns) {
    thread_local std::vector<float> memory;
    const size_t floats = static_cast<size_t>(rows * columns);
    if (memory.size() < floats) memory.resize(floats);
    return {memory.data(), rows, columns, columns};
}

void launch_norm_row_linear(const RowProductArguments& a) {
    const Rows normed = intermediate<0>(a.x.count, a.x.width);
    launch<RmsNorm>(kernels().rms_norm, {a.x, {}, normed, a.norm_weight, nullptr, a.dtype, a.eps});
    RowProductArguments product = a;
    product.x = normed;
    if (a.gated) product.out = intermediate<1>(a.x.count, a.weight.count);
    launch_row_product(product);
    if (a.gated) launch<SiluMul>(kernels().silu_mul, {product.out, a.out, a.dtype});
}

void launch_row_linear_add(const RowProductArguments& a) {
    RowProductArguments product = a;
    product.out = intermediate<0>(a.out.count, a.out.width);
    launch_row_product(product);
    thread_local std::vector<float> ones;
    if (ones.size() < static_cast<size_t>(a.out.width)) ones.resize(a.out.width, 1.0f);
    launch<GatedAdd>(kernels().gated_add, {a.out, product.out, ones.data(), a.dtype, DType::f32});
}

void launch_sample_tokens(const SampleTokensArguments& a) {
    run(cpu::sample_rows, a, {a.logits.count, a.logits.width});
}

template <class Op, class Launch>
void define(py::module_& module, const Launch& launch) {
    module.def(Op::kName, checked(&Op::check, Device::cpu, launch), Parameters(Op::kParameters),
               py::call_guard<py::gil_scoped_release>());
}

void define_ops(py::module_& module) {
#define OP(function, Op) \
    define<Op>(module, [](const cpu::ArgumentsOf<Op>& a) { launch<Op>(kernels().function, a); });
#define KERNEL(function, Arguments)
#include "cpu/kernels.inc"
    define<LinearW8A16>(module, [](const LinearArguments& a) { launch<Linear>(kernels().linear, a); });
    define<NormRowLinear>(module, launch_norm_row_linear);
    define<RowLinearAdd>(module, launch_row_linear_add);
    define<SampleTokens>(module, launch_sample_tokens);
}

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
    define_ops(module);

    module.def("num_threads", &cpu::num_threads, "Threads that share the work of an op.");
    module.def("set_num_threads", &cpu::set_num_threads, "threads"_a, no_gil);
    module.def(
        "isa", [] { return cpu::name_of(cpu::current_isa()); }, "Instruction set of the kernels in use.");
    module.def("isas", &isas_here, "Instruction sets that this build has and this machine runs.");
    module.def("has_bf16_products", &cpu::has_bf16_products,
               "Whether the kernels in use multiply pairs of bfloat16 in one instruction (AVX512_BF16).");
    module.def("set_isa", &set_isa, "name"_a);
    module.def("philox", &philox, "seed"_a, "stream"_a, "position"_a, "count"_a,
               "The first `count` numbers of a stream, as blip3o_rt.random.philox_uint32.");
}

}  // namespace blip3o::bindings
