// Module blip3o_rt._cpu: the CPU ops on torch tensors, and the settings of their threads and instruction set.
#include "blip3o/philox.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

namespace blip3o::bindings {
namespace {

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
    const py::kw_only keywords;
    const py::none none;

    module.def("rms_norm", &cpu::rms_norm, "x"_a, "weight"_a, "eps"_a, keywords, "bias"_a = none,
               "residual"_a = none, "out"_a, no_gil);
    module.def("silu_mul", &cpu::silu_mul, "gate_up"_a, keywords, "out"_a, no_gil);
    module.def("row_linear", &cpu::row_linear, "x"_a, "weight"_a, keywords, "bias"_a = none, "out"_a, no_gil);
    module.def("row_linear_w8", &cpu::row_linear_w8, "x"_a, "weight"_a, "scale"_a, keywords, "bias"_a = none,
               "out"_a, no_gil);
    module.def("norm_row_linear", &cpu::norm_row_linear, "x"_a, "norm_weight"_a, "eps"_a, "weight"_a,
               keywords, "scale"_a = none, "gated"_a = false, "scratch"_a = none, "out"_a, no_gil);
    module.def("row_linear_add", &cpu::row_linear_add, "x"_a, "weight"_a, "residual"_a, keywords,
               "scale"_a = none, no_gil);
    module.def("linear", &cpu::linear, "x"_a, "weight"_a, "bias"_a = none, keywords, "out"_a, no_gil);
    module.def("linear_w8a16", &cpu::linear_w8a16, "x"_a, "weight"_a, "scale"_a, keywords, "out"_a, no_gil);
    module.def("quantize_rows", &cpu::quantize_rows, "x"_a, "scale"_a, keywords, "dtype"_a = none, "out"_a,
               no_gil);
    module.def("scale_product", &cpu::scale_product, "product"_a, "scale"_a, keywords, "out"_a,
               "row_scale"_a = none, "bias"_a = none, no_gil);
    module.def("qk_norm_rope_append", &cpu::qk_norm_rope_append, "qkv"_a, "q_weight"_a, "k_weight"_a,
               "cos_sin_cache"_a, "positions"_a, "slot_mapping"_a, "k_cache"_a, "v_cache"_a, "eps"_a,
               keywords, "out"_a, no_gil);
    module.def("paged_decode_attention", &cpu::paged_decode_attention, "q"_a, "k_cache"_a, "v_cache"_a,
               "page_table"_a, "context_lens"_a, "scale"_a, keywords, "scratch"_a = none, "out"_a, no_gil);
    module.def("advance_rows", &cpu::advance_rows, "sampled_ids"_a, "first_ids"_a, "page_table"_a,
               "page_size"_a, "num_generated"_a, "context_lens"_a, "output_slots"_a, "output_ids"_a,
               "positions"_a, "slot_mapping"_a, keywords, "out"_a, no_gil);
    module.def("sample_tokens", &cpu::sample_tokens, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a,
               "seeds"_a, "positions"_a, keywords, "scratch"_a = none, "out"_a, no_gil);
    module.def("nearest_code", &cpu::nearest_code, "features"_a, "codebook"_a, keywords, "out"_a, no_gil);
    module.def("relu_linear_attention", &cpu::relu_linear_attention, "qkv"_a, "q_weight"_a, "k_weight"_a,
               "num_heads"_a, "eps"_a, keywords, "out"_a, no_gil);
    module.def("cross_attention", &cpu::cross_attention, "query"_a, "key"_a, "value"_a, "query_weight"_a,
               "eps"_a, keywords, "log_multiplicity"_a = none, "out"_a, no_gil);
    module.def("depthwise_glu", &cpu::depthwise_glu, "x"_a, "input_bias"_a, "weight"_a, "bias"_a, keywords,
               "out"_a, no_gil);
    module.def("layer_norm_modulate", &cpu::layer_norm_modulate, "x"_a, "shift"_a, "scale"_a, "eps"_a,
               keywords, "out"_a, no_gil);
    module.def("gated_add", &cpu::gated_add, "residual"_a, "x"_a, "gate"_a, no_gil);
    module.def("channel_rms_norm", &cpu::channel_rms_norm, "x"_a, "weight"_a, "bias"_a, "eps"_a, keywords,
               "residual"_a = none, "relu"_a = false, "out"_a, no_gil);
    module.def("add_pixel_shuffle", &cpu::add_pixel_shuffle, "result"_a, "x"_a, keywords, "bias"_a = none,
               no_gil);
    module.def("add_pixel_unshuffle", &cpu::add_pixel_unshuffle, "result"_a, "x"_a, keywords, "bias"_a = none,
               no_gil);

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
