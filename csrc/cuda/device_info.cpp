#include "cuda/device_info.h"

#include "cuda/launch.h"

namespace blip3o::cuda {

MachineInfo machine_info() {
    MachineInfo info = {};
    check(cudaRuntimeGetVersion(&info.runtime_version), "cudaRuntimeGetVersion");
    cudaDriverGetVersion(&info.driver_version);
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    // 35: no driver, or one older than this runtime. 100: a driver, but no GPU.
    if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
        info.reason = info.driver_version == 0 ? "no NVIDIA driver is installed" : cudaGetErrorString(error);
        return info;
    }
    check(error, "cudaGetDeviceCount");
    for (int index = 0; index < count; ++index) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
        info.devices.push_back({properties.name, properties.major, properties.minor,
                                properties.totalGlobalMem, properties.multiProcessorCount});
    }
    return info;
}

}  // namespace blip3o::cuda
