// Module blip3o_rt._cuda: the CUDA ops on torch tensors, launched on torch's current stream, and the GPUs that there
// are.
//
// The CUDA runtime is linked statically, so the module imports on a machine without a driver.
#include <tuple>

#include "cuda/device_info.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/workspaces.h"
#include "define_op.h"
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

cudaStream_t stream_of(const TensorView& tensor) {
    return static_cast<cudaStream_t>(current_stream(tensor.device_index));
}

// Defines an op. launch(arguments, views, stream) runs on the device of the op's first tensor.
template <class Op, class Arguments, class... Views, class Launch>
void define(py::module_& module, Arguments (*check)(Device, Views...), Launch launch) {
    const auto function = [=](Views... views) {
        const Arguments arguments = check(Device::cuda, views...);
        const std::tuple<Views...> all(views...);
        const TensorView& first = std::get<0>(all);
        const DeviceGuard guard(first.device_index);
        launch(arguments, all, stream_of(first));
    };
    module.def(Op::kName, function, Parameters(Op::kParameters));
}

// Defines an op of cuda/ops.h that needs no scratch memory.
template <class Op, class Arguments>
void define(py::module_& module, void (*launch)(const Arguments&, cudaStream_t)) {
    define<Op>(module, &Op::check, [=](const Arguments& arguments, const auto&, cudaStream_t stream) {
        launch(arguments, stream);
    });
}

// At least so many elements of scratch memory, on the device of the op's first tensor.
void* check_scratch(const char* op, const char* name, const TensorView& memory, DType dtype, int64_t elements,
                    const TensorView& first) {
    Contract contract(op, Device::cuda);
    Dim size("elements");
    contract(first, "the first argument");
    void* data = contract(memory, name).array(dtype, {&size});
    contract.require(size.value() >= elements, "the scratch memory is too small for these shapes");
    return data;
}

template <class Views>
cuda::LaunchScratch check_scratch(const char* op, DType dtype, int64_t size, int64_t counters,
                                  const Views& views) {
    const TensorView& first = std::get<0>(views);
    const Scratch& scratch = std::get<const Scratch&>(views);
    return {
        check_scratch(op, "scratch", scratch.memory, dtype, size, first),
        static_cast<unsigned*>(check_scratch(op, "counters", scratch.counters, DType::i32, counters, first))};
}

template <class Views>
cuda::LaunchScratch attention_scratch(const char* op, const PagedDecodeAttentionArguments& a,
                                      const Views& views) {
    const int64_t size =
        cuda::attention_workspace(a.batch, a.q_heads, a.cache.head_dim, a.max_pages * a.cache.page_size);
    return check_scratch(op, DType::f32, size, a.batch * a.cache.kv_heads, views);
}

void define_ops(py::module_& module) {
    define<AdvanceWindows>(module, cuda::advance_windows);
    define<PagedPrefillAttention>(module, cuda::paged_prefill_attention);
    define<QkNormRopeAppend>(module, cuda::qk_norm_rope_append);
    define<RmsNorm>(module, cuda::rms_norm);
    define<RmsNormKeep>(module, cuda::rms_norm);
    define<RowLinear>(module, cuda::row_linear);
    define<RowLinearAdd>(module, cuda::row_linear);
    define<RowLinearW8>(module, cuda::row_linear);
    define<SiluMul>(module, cuda::silu_mul);
    define<NormRowLinear>(module, &NormRowLinear::check,
                          [](const RowProductArguments& a, const auto&, cudaStream_t stream) {
                              NormRowLinear::check_few_rows(a);
                              cuda::row_linear(a, stream);
                          });
    define<PagedDecodeAttention>(
        module, &PagedDecodeAttention::check,
        [](const PagedDecodeAttentionArguments& a, const auto& views, cudaStream_t stream) {
            const auto scratch = attention_scratch(PagedDecodeAttention::kName, a, views);
            cuda::paged_decode_attention(a, scratch, stream);
        });
    define<DecodeAttention>(module, &DecodeAttention::check,
                            [](const DecodeAttentionArguments& a, const auto& views, cudaStream_t stream) {
                                const auto scratch =
                                    attention_scratch(DecodeAttention::kName, a.attention, views);
                                cuda::decode_attention(a, scratch, stream);
                            });
    define<SampleTokens>(
        module, &SampleTokens::check,
        [](const SampleTokensArguments& a, const auto& views, cudaStream_t stream) {
            const int64_t size = cuda::sample_tokens_workspace(a.logits.count, a.logits.width);
            const auto scratch = check_scratch(SampleTokens::kName, DType::i64, size, a.logits.count, views);
            cuda::sample_tokens(a, scratch, stream);
        });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of blip3o_rt; the contracts are in blip3o_rt.ops";
    translate_argument_errors();
    define_ops(module);
    module.def("attention_workspace", &cuda::attention_workspace, "batch"_a, "q_heads"_a, "head_dim"_a,
               "positions"_a,
               "float32 elements of scratch memory for a page table that holds so many positions.");
    module.def("sample_tokens_workspace", &cuda::sample_tokens_workspace, "batch"_a, "vocabulary"_a,
               "int64 elements of scratch memory.");
    module.def("device_info", &device_info,
               "devices [{name, compute_capability, total_memory (bytes), multiprocessors}], driver_version "
               "and runtime_version (1000 * major + 10 * minor), and the reason if there is no device.");
    module.def(
        "set_dependent_launches",
        [](bool on) { cuda::launches = on ? cuda::Launches::first_of_chain : cuda::Launches::ordinary; },
        "on"_a,
        "Whether this thread's next launches but the first may begin while the kernel before them runs.");
    module.attr("architectures") = BLIP3O_CUDA_ARCHITECTURES;
}

}  // namespace blip3o::bindings
