// Module blip3o_rt._cuda: the CUDA ops on torch tensors, launched on torch's current stream, and what GPUs
// there are.
//
// The CUDA runtime is linked statically, so the module imports on a machine without a driver.
#include "blip3o/contracts.h"
#include "cuda/device_info.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/workspaces.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

namespace blip3o::bindings {
namespace {

// Makes a tensor's device the current one for a launch.
class DeviceGuard {
  public:
    explicit DeviceGuard(int index) {
        cuda::check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (index != previous_) cuda::check(cudaSetDevice(index), "cudaSetDevice");
        changed_ = index != previous_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

py::dict device_info() {
    const cuda::MachineInfo info = cuda::machine_info();
    py::list devices;
    for (const cuda::DeviceInfo& device : info.devices) {
        devices.append(py::dict(
            "name"_a = device.name, "compute_capability"_a = py::make_tuple(device.major, device.minor),
            "total_memory"_a = device.total_memory, "multiprocessors"_a = device.multiprocessors));
    }
    return py::dict("devices"_a = devices, "driver_version"_a = info.driver_version,
                    "runtime_version"_a = info.runtime_version, "reason"_a = info.reason);
}

// Runs one of cuda/ops.h on the device that `tensor` is on, on torch's current stream there.
template <class... Parameters, class... Arguments>
void run(void (*op)(Parameters...), const TensorView& tensor, const Arguments&... arguments) {
    const DeviceGuard guard(tensor.device_index);
    op(arguments..., static_cast<cudaStream_t>(current_stream(tensor.device_index)));
}

void rms_norm(const TensorView& x, const TensorView& weight, double eps, const OptionalView& bias,
              const OptionalView& residual, const TensorView& out) {
    run(cuda::rms_norm, x, check_rms_norm(Device::cuda, x, weight, eps, bias, residual, out));
}

void silu_mul(const TensorView& gate_up, const TensorView& out) {
    run(cuda::silu_mul, gate_up, check_silu_mul(Device::cuda, gate_up, out));
}

void row_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                const TensorView& out) {
    run(cuda::row_linear, x, row_product(check_row_linear(Device::cuda, x, weight, bias, out)));
}

void row_linear_w8(const TensorView& x, const TensorView& weight, const TensorView& scale,
                   const OptionalView& bias, const TensorView& out) {
    run(cuda::row_linear, x, row_product(check_row_linear_w8(Device::cuda, x, weight, scale, bias, out)));
}

void norm_row_linear(const TensorView& x, const TensorView& norm_weight, double eps, const TensorView& weight,
                     const OptionalView& scale, bool gated, Unused, const TensorView& out) {
    run(cuda::row_linear, x,
        check_few_norm_row_linear(Device::cuda, x, norm_weight, eps, weight, scale, gated, out));
}

void row_linear_add(const TensorView& x, const TensorView& weight, const TensorView& residual,
                    const OptionalView& scale) {
    run(cuda::row_linear, x, check_row_linear_add(Device::cuda, x, weight, residual, scale));
}

void qk_norm_rope_append(const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
                         const TensorView& cos_sin_cache, const TensorView& positions,
                         const TensorView& slot_mapping, const TensorView& k_cache, const TensorView& v_cache,
                         double eps, const TensorView& out) {
    run(cuda::qk_norm_rope_append, qkv,
        check_qk_norm_rope_append(Device::cuda, qkv, q_weight, k_weight, cos_sin_cache, positions,
                                  slot_mapping, k_cache, v_cache, eps, out));
}

using AttentionMemory = std::pair<TensorView, TensorView>;  // workspace and counters

// The scratch memory of an attention whose first argument is `beside`, checked.
cuda::AttentionScratch attention_scratch(const char* op, const PagedDecodeAttentionArguments& a,
                                         const AttentionMemory& memory, const TensorView& beside) {
    const int64_t size =
        cuda::attention_workspace(a.batch, a.q_heads, a.cache.head_dim, a.max_blocks * a.cache.page_size);
    const int64_t count = a.batch * a.cache.kv_heads;
    return {
        check_workspace(op, memory.first, DType::f32, size, beside),
        static_cast<unsigned*>(check_workspace(op, memory.second, DType::i32, count, beside, "counters"))};
}

void paged_decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                            const TensorView& page_table, const TensorView& context_lens, double scale,
                            const AttentionMemory& scratch, const TensorView& out) {
    const auto arguments =
        check_paged_decode_attention(Device::cuda, q, k_cache, v_cache, page_table, context_lens, scale, out);
    run(cuda::paged_decode_attention, q, arguments,
        attention_scratch("paged_decode_attention", arguments, scratch, q));
}

void decode_attention(const TensorView& qkv, const TensorView& q_weight, const TensorView& k_weight,
                      const TensorView& cos_sin_cache, const TensorView& positions,
                      const TensorView& slot_mapping, const TensorView& k_cache, const TensorView& v_cache,
                      const TensorView& page_table, const TensorView& context_lens, double eps, double scale,
                      const AttentionMemory& scratch, const TensorView& out) {
    const auto arguments =
        check_decode_attention(Device::cuda, qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping,
                               k_cache, v_cache, page_table, context_lens, eps, scale, out);
    run(cuda::decode_attention, qkv, arguments,
        attention_scratch("decode_attention", arguments.attention, scratch, qkv));
}

void advance_rows(const TensorView& sampled_ids, const TensorView& first_ids, const TensorView& page_table,
                  int64_t page_size, const TensorView& num_generated, const TensorView& context_lens,
                  const TensorView& output_slots, const TensorView& output_ids, const TensorView& positions,
                  const TensorView& slot_mapping, const TensorView& out) {
    run(cuda::advance_rows, sampled_ids,
        check_advance_rows(Device::cuda, sampled_ids, first_ids, page_table, page_size, num_generated,
                           context_lens, output_slots, output_ids, positions, slot_mapping, out));
}

void paged_prefill_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                             const TensorView& page_table, const TensorView& cu_seqlens_q,
                             const TensorView& context_lens, double scale, const TensorView& out) {
    run(cuda::paged_prefill_attention, q,
        check_paged_prefill_attention(Device::cuda, q, k_cache, v_cache, page_table, cu_seqlens_q,
                                      context_lens, scale, out));
}

void sample_tokens(const TensorView& logits, const TensorView& temperature, const TensorView& top_k,
                   const TensorView& top_p, const TensorView& seeds, const TensorView& positions,
                   const TensorView& scratch, const TensorView& out) {
    const auto arguments =
        check_sample_tokens(Device::cuda, logits, temperature, top_k, top_p, seeds, positions, out);
    const int64_t size = cuda::sample_tokens_workspace(arguments.logits.count, arguments.logits.width);
    run(cuda::sample_tokens, logits, arguments,
        check_workspace("sample_tokens", scratch, DType::i64, size, logits));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of blip3o_rt; the contracts are in blip3o_rt.ops";
    translate_argument_errors();
    const py::kw_only keywords;
    const py::none none;
    module.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, keywords, "bias"_a = none,
               "residual"_a = none, "out"_a);
    module.def("silu_mul", &silu_mul, "gate_up"_a, keywords, "out"_a);
    module.def("row_linear", &row_linear, "x"_a, "weight"_a, keywords, "bias"_a = none, "out"_a);
    module.def("row_linear_w8", &row_linear_w8, "x"_a, "weight"_a, "scale"_a, keywords, "bias"_a = none,
               "out"_a);
    module.def("norm_row_linear", &norm_row_linear, "x"_a, "norm_weight"_a, "eps"_a, "weight"_a, keywords,
               "scale"_a = none, "gated"_a = false, "scratch"_a = none, "out"_a);
    module.def("row_linear_add", &row_linear_add, "x"_a, "weight"_a, "residual"_a, keywords,
               "scale"_a = none);
    module.def("qk_norm_rope_append", &qk_norm_rope_append, "qkv"_a, "q_weight"_a, "k_weight"_a,
               "cos_sin_cache"_a, "positions"_a, "slot_mapping"_a, "k_cache"_a, "v_cache"_a, "eps"_a,
               keywords, "out"_a);
    module.def("paged_decode_attention", &paged_decode_attention, "q"_a, "k_cache"_a, "v_cache"_a,
               "page_table"_a, "context_lens"_a, "scale"_a, keywords, "scratch"_a, "out"_a);
    module.def("decode_attention", &decode_attention, "qkv"_a, "q_weight"_a, "k_weight"_a, "cos_sin_cache"_a,
               "positions"_a, "slot_mapping"_a, "k_cache"_a, "v_cache"_a, "page_table"_a, "context_lens"_a,
               "eps"_a, "scale"_a, keywords, "scratch"_a, "out"_a);
    module.def("paged_prefill_attention", &paged_prefill_attention, "q"_a, "k_cache"_a, "v_cache"_a,
               "page_table"_a, "cu_seqlens_q"_a, "context_lens"_a, "scale"_a, keywords, "out"_a);
    module.def("attention_workspace", &cuda::attention_workspace, "batch"_a, "q_heads"_a, "head_dim"_a,
               "positions"_a,
               "float32 elements of scratch memory for a block table that holds so many positions.");
    module.def("advance_rows", &advance_rows, "sampled_ids"_a, "first_ids"_a, "page_table"_a, "page_size"_a,
               "num_generated"_a, "context_lens"_a, "output_slots"_a, "output_ids"_a, "positions"_a,
               "slot_mapping"_a, keywords, "out"_a);
    module.def("sample_tokens", &sample_tokens, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "seeds"_a,
               "positions"_a, keywords, "scratch"_a, "out"_a);
    module.def("sample_tokens_workspace", &cuda::sample_tokens_workspace, "batch"_a, "vocabulary"_a,
               "int64 elements of scratch memory.");
    module.def(
        "device_info", &device_info,
        "devices [{name, compute_capability, total_memory (bytes), multiprocessors}], driver_version and "
        "runtime_version (1000 * major + 10 * minor), and the reason if there is no device.");
    module.attr("architectures") = BLIP3O_CUDA_ARCHITECTURES;
}

}  // namespace blip3o::bindings
