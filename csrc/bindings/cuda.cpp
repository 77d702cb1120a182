// Module blip3o_rt._cuda: the CUDA ops on torch tensors, launched on torch's current stream; what GPUs there are.
//
// The CUDA runtime is linked statically, so the module imports on a machine without a driver.
#include "blip3o/contracts.h"
#include "cuda/device_info.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
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

void rms_norm(const TensorView& x, const TensorView& weight, double eps, const OptionalView& bias,
              const OptionalView& residual, const TensorView& out) {
    const auto arguments = check_rms_norm(Device::cuda, x, weight, eps, bias, residual, out);
    const DeviceGuard guard(x.device_index);
    cuda::rms_norm(arguments, static_cast<cudaStream_t>(current_stream(x.device_index)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of blip3o_rt; the contracts are in blip3o_rt.ops";
    translate_argument_errors();
    module.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "bias"_a, "residual"_a, "out"_a);
    module.def(
        "device_info", &device_info,
        "devices [{name, compute_capability, total_memory (bytes), multiprocessors}], driver_version and "
        "runtime_version (1000 * major + 10 * minor), and the reason if there is no device.");
    module.attr("architectures") = BLIP3O_CUDA_ARCHITECTURES;
}

}  // namespace blip3o::bindings
