// Python module simt_kernels: opens a library made of entry.cpp and calls its op on CPU tensors, with the
// arguments of blip3o_rt._cuda.
#include <dlfcn.h>

#include "blip3o/contracts.h"
#include "cuda/workspaces.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

namespace blip3o::bindings {
namespace {

using AttentionMemory = std::pair<TensorView, TensorView>;  // workspace and counters

class Library {
  public:
    explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (!handle_) throw std::runtime_error(dlerror());
    }

    void set_descending(bool descending) const { find<void(bool)>("simt_set_descending")(descending); }

    void set_multiprocessors(int count) const { find<void(int)>("simt_set_multiprocessors")(count); }

    void rms_norm(const TensorView& x, const TensorView& weight, double eps, const OptionalView& bias,
                  const OptionalView& residual, const TensorView& out) const {
        call(check_rms_norm(Device::cpu, x, weight, eps, bias, residual, out));
    }

    void silu_mul(const TensorView& gate_up, const TensorView& out) const {
        call(check_silu_mul(Device::cpu, gate_up, out));
    }

    void row_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                    const TensorView& out) const {
        call(row_product(check_row_linear(Device::cpu, x, weight, bias, out)));
    }

    void row_linear_w8(const TensorView& x, const TensorView& weight, const TensorView& scale,
                         const OptionalView& bias, const TensorView& out) const {
        call(row_product(check_row_linear_w8(Device::cpu, x, weight, scale, bias, out)));
    }

    void norm_row_linear(const TensorView& x, const TensorView& norm_weight, double eps,
                         const TensorView& weight, const OptionalView& scale, bool gated, Unused,
                         const TensorView& out) const {
        call(check_few_norm_row_linear(Device::cpu, x, norm_weight, eps, weight, scale, gated, out));
    }

    void row_linear_add(const TensorView& x, const TensorView& weight, const TensorView& residual, const OptionalView& scale) const {
        call(check_row_linear_add(Device::cpu, x, weight, residual, scale));
    }

    void qk_norm_rope_append(const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
                             const TensorView& cos_sin_cache, const TensorView& positions,
                             const TensorView& slot_mapping, const TensorView& k_cache, const TensorView& v_cache,
                             double eps, const TensorView& out) const {
        call(check_qk_norm_rope_append(Device::cpu, qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping,
                                       k_cache, v_cache, eps, out));
    }

    void paged_decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                                const TensorView& page_table, const TensorView& context_lens,
                                double scale, const AttentionMemory& memory, const TensorView& out) const {
        cuda::AttentionScratch scratch = {memory.first.data, memory.second.as<unsigned>()};
        call(check_paged_decode_attention(Device::cpu, q, k_cache, v_cache, page_table, context_lens,
                                          scale, out),
             &scratch);
    }

    void decode_attention(const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
                          const TensorView& cos_sin_cache, const TensorView& positions, const TensorView& slot_mapping,
                          const TensorView& k_cache, const TensorView& v_cache, const TensorView& page_table,
                          const TensorView& context_lens, double eps, double scale,
                          const AttentionMemory& memory, const TensorView& out) const {
        cuda::AttentionScratch scratch = {memory.first.data, memory.second.as<unsigned>()};
        call(check_decode_attention(Device::cpu, qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping,
                                    k_cache, v_cache, page_table, context_lens, eps, scale, out),
             &scratch);
    }

    void advance_rows(const TensorView& sampled_ids, const TensorView& first_ids, const TensorView& page_table,
                      int64_t page_size, const TensorView& num_generated, const TensorView& context_lens,
                      const TensorView& output_slots, const TensorView& output_ids, const TensorView& positions,
                      const TensorView& slot_mapping, const TensorView& out) const {
        call(check_advance_rows(Device::cpu, sampled_ids, first_ids, page_table, page_size, num_generated, context_lens,
                                output_slots, output_ids, positions, slot_mapping, out));
    }

    void paged_prefill_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                                 const TensorView& page_table, const TensorView& cu_seqlens_q,
                                 const TensorView& context_lens, double scale,
                                 const TensorView& out) const {
        call(check_paged_prefill_attention(Device::cpu, q, k_cache, v_cache, page_table, cu_seqlens_q,
                                           context_lens, scale, out));
    }

    void sample_tokens(const TensorView& logits, const TensorView& temperature, const TensorView& top_k,
                       const TensorView& top_p, const TensorView& seeds, const TensorView& positions,
                       const TensorView& scratch, const TensorView& out) const {
        call(check_sample_tokens(Device::cpu, logits, temperature, top_k, top_p, seeds, positions, out),
             scratch.data);
    }

  private:
    template <class Function>
    Function* find(const char* name) const {
        return reinterpret_cast<Function*>(dlsym(handle_, name));
    }

    template <class Arguments>
    void call(const Arguments& arguments, void* workspace = nullptr) const {
        find<void(const void*, void*)>("simt_call")(&arguments, workspace);
    }

    void* handle_;  // never closed: the library lives with the process
};

}  // namespace

PYBIND11_MODULE(simt_kernels, module) {
    translate_argument_errors();
    const py::kw_only keywords;
    const py::none none;
    module.def("attention_workspace", &cuda::attention_workspace);
    module.def("sample_tokens_workspace", &cuda::sample_tokens_workspace);
    py::class_<Library>(module, "Library")
        .def(py::init<const std::string&>())
        .def("set_descending", &Library::set_descending)
        .def("set_multiprocessors", &Library::set_multiprocessors)
        .def("rms_norm", &Library::rms_norm, "x"_a, "weight"_a, "eps"_a, keywords, "bias"_a = none,
               "residual"_a = none, "out"_a)
        .def("silu_mul", &Library::silu_mul, "gate_up"_a, keywords, "out"_a)
        .def("row_linear", &Library::row_linear, "x"_a, "weight"_a, keywords, "bias"_a = none, "out"_a)
        .def("row_linear_w8", &Library::row_linear_w8, "x"_a, "weight"_a, "scale"_a, keywords, "bias"_a = none,
               "out"_a)
        .def("norm_row_linear", &Library::norm_row_linear, "x"_a, "norm_weight"_a, "eps"_a, "weight"_a, keywords,
               "scale"_a = none, "gated"_a = false, "scratch"_a = none, "out"_a)
        .def("row_linear_add", &Library::row_linear_add, "x"_a, "weight"_a, "residual"_a, keywords,
               "scale"_a = none)
        .def("qk_norm_rope_append", &Library::qk_norm_rope_append, "qkv"_a, "q_weight"_a, "k_weight"_a,
               "cos_sin_cache"_a, "positions"_a, "slot_mapping"_a, "k_cache"_a, "v_cache"_a, "eps"_a, keywords,
               "out"_a)
        .def("paged_decode_attention", &Library::paged_decode_attention, "q"_a, "k_cache"_a, "v_cache"_a,
               "page_table"_a, "context_lens"_a, "scale"_a, keywords, "scratch"_a, "out"_a)
        .def("decode_attention", &Library::decode_attention, "qkv"_a, "q_weight"_a, "k_weight"_a, "cos_sin_cache"_a,
               "positions"_a, "slot_mapping"_a, "k_cache"_a, "v_cache"_a, "page_table"_a, "context_lens"_a,
               "eps"_a, "scale"_a, keywords, "scratch"_a, "out"_a)
        .def("paged_prefill_attention", &Library::paged_prefill_attention, "q"_a, "k_cache"_a, "v_cache"_a,
               "page_table"_a, "cu_seqlens_q"_a, "context_lens"_a, "scale"_a, keywords, "out"_a)
        .def("advance_rows", &Library::advance_rows, "sampled_ids"_a, "first_ids"_a, "page_table"_a, "page_size"_a,
               "num_generated"_a, "context_lens"_a, "output_slots"_a, "output_ids"_a, "positions"_a,
               "slot_mapping"_a, keywords, "out"_a)
        .def("sample_tokens", &Library::sample_tokens, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "seeds"_a,
               "positions"_a, keywords, "scratch"_a, "out"_a);
}

}  // namespace blip3o::bindings
