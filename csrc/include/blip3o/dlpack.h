// The parts of the DLPack 1.x binary interface that the bindings use to look into a tensor.
//
// Specification: https://dmlc.github.io/dlpack (DLTensor; C exchange API, since 1.3).
#pragma once

#include <cstdint>

namespace blip3o::dlpack {

struct Device {
    int32_t type;  // 1: CPU, 2: CUDA
    int32_t index;
};

struct DataType {
    uint8_t code;  // 0: int, 2: float, 4: bfloat, 10: float8_e4m3fn
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct Version {
    uint32_t major, minor;
};

struct ExchangeHeader {
    Version version;
    ExchangeHeader* previous;
};

// Functions of a tensor library that need no Python call; a non-zero result means a Python error is set.
struct Exchange {
    ExchangeHeader header;
    void* allocate;
    void* managed_from_python;
    void* managed_to_python;
    int (*view_from_python)(void* object, Tensor* view);  // may be null; lives as long as the object
    int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace blip3o::dlpack
