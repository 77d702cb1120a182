// What GPUs this machine has.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace blip3o::cuda {

struct DeviceInfo {
    std::string name;
    int major, minor;     // compute capability
    size_t total_memory;  // bytes
    int multiprocessors;
};

struct MachineInfo {
    std::vector<DeviceInfo> devices;
    int driver_version;   // the newest CUDA the driver runs, 1000 * major + 10 * minor; 0 without a driver
    int runtime_version;  // the CUDA this module was built with
    std::string reason;   // why there is no device; empty if there is one
};

// Nothing is an error here: whatever CUDA answers (no driver, no GPU, a GPU that is lost or in use by another
// process alone), there are then no devices and a reason.
MachineInfo machine_info();

}  // namespace blip3o::cuda
