#include "cuda/device_info.h"

#include "cuda/launch.h"

namespace blip3o::cuda {
namespace {

std::vector<DeviceInfo> find_devices() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<DeviceInfo> devices;
    for (int index = 0; index < count; ++index) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
        devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem,
                           properties.multiProcessorCount});
    }
    return devices;
}

}  // namespace

MachineInfo machine_info() {
    MachineInfo info = {};
    cudaRuntimeGetVersion(&info.runtime_version);
    cudaDriverGetVersion(&info.driver_version);
    try {
        info.devices = find_devices();
        if (info.devices.empty()) info.reason = "CUDA finds none";
    } catch (const std::runtime_error& error) {
        info.reason = info.driver_version == 0 ? "no NVIDIA driver is installed" : error.what();
    }
    return info;
}

}  // namespace blip3o::cuda
