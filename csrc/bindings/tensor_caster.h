// How a torch.Tensor argument becomes a TensorView, and an ArgumentError becomes an OpError.
//
// torch.Tensor carries a table of C functions (DLPack's exchange API) that fill in pointer, shape, strides
// and dtype without a Python call or a copy: about 50 ns a tensor, against about 600 for reading the four
// attributes from Python. It needs no torch header, and also tells the current CUDA stream.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "blip3o/dlpack.h"
#include "blip3o/op.h"

namespace blip3o::bindings {

namespace py = pybind11;

struct Torch {
    PyTypeObject* tensor_type;
    const dlpack::Exchange* exchange;
};

inline const Torch& torch() {
    static const Torch found = [] {
        const py::object type = py::module_::import("torch").attr("Tensor");
        const py::capsule table = type.attr("__dlpack_c_exchange_api__");
        const auto* exchange = static_cast<const dlpack::Exchange*>(table.get_pointer());
        if (exchange->header.version.major != 1 || !exchange->view_from_python) {
            throw std::runtime_error(
                "this torch exports tensors in a way unknown here; accepted: DLPack 1.3 or later");
        }
        return Torch{reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()),
                     exchange};  // lives with the process
    }();
    return found;
}

inline DType dtype_of(dlpack::DataType type) {
    if (type.lanes != 1) return DType::other;
    if (type.code == 2 && type.bits == 32) return DType::f32;
    if (type.code == 4 && type.bits == 16) return DType::bf16;
    if (type.code == 10 && type.bits == 8) return DType::e4m3;
    if (type.code == 0 && type.bits == 8) return DType::i8;
    if (type.code == 0 && type.bits == 32) return DType::i32;
    if (type.code == 0 && type.bits == 64) return DType::i64;
    if (type.code == 2 && type.bits == 64) return DType::f64;
    if (type.code == 2 && type.bits == 16) return DType::f16;
    if (type.code == 1 && type.bits == 8) return DType::u8;
    if (type.code == 6 && type.bits == 8) return DType::boolean;
    return DType::other;
}

// Raises ArgumentError for a tensor without memory of its own (meta, sparse).
inline dlpack::Tensor look_into(const Torch& torch, py::handle source) {
    dlpack::Tensor tensor;
    try {
        if (torch.exchange->view_from_python(source.ptr(), &tensor) != 0) throw py::error_already_set();
    } catch (const std::exception& error) {
        const std::string message = error.what();
        throw ArgumentError("an argument is no plain tensor: " + message.substr(0, message.find('\n')));
    }
    return tensor;
}

inline TensorView view_of(const dlpack::Tensor& tensor) {
    if (tensor.ndim > TensorView::kMaxDims) throw ArgumentError("a tensor has more than 8 dimensions");
    TensorView view;
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.dtype = dtype_of(tensor.dtype);
    view.device = tensor.device.type == 1   ? Device::cpu
                  : tensor.device.type == 2 ? Device::cuda
                                            : Device::other;
    view.device_index = tensor.device.index;
    view.ndim = tensor.ndim;
    for (int i = 0; i < tensor.ndim; ++i) {
        view.shape[i] = tensor.shape[i];
        view.stride[i] = tensor.strides[i];
    }
    return view;
}

// The stream that torch currently launches on.
inline void* current_stream(int device_index) {
    void* stream = nullptr;
    if (torch().exchange->current_stream(2, device_index, &stream) != 0) throw py::error_already_set();
    return stream;
}

// Raise blip3o_rt.errors.OpError for an ArgumentError.
inline void translate_argument_errors() {
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const ArgumentError& argument_error) {
            const py::object op_error = py::module_::import("blip3o_rt.errors").attr("OpError");
            PyErr_SetString(op_error.ptr(), argument_error.what());
        }
    });
}

}  // namespace blip3o::bindings

template <>
struct pybind11::detail::type_caster<blip3o::TensorView> {
    PYBIND11_TYPE_CASTER(blip3o::TensorView, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        const auto& torch = blip3o::bindings::torch();
        if (!PyObject_TypeCheck(source.ptr(), torch.tensor_type)) return false;
        value = blip3o::bindings::view_of(blip3o::bindings::look_into(torch, source));
        return true;
    }
};

// A tensor, two of them (memory, counters), or anything else, which stands for none.
template <>
struct pybind11::detail::type_caster<blip3o::Scratch> {
    PYBIND11_TYPE_CASTER(blip3o::Scratch, const_name("object"));

    bool load(handle source, bool convert) {
        type_caster<blip3o::TensorView> memory, counters;
        if (isinstance<tuple>(source) && len(source) == 2) {
            const auto pair = reinterpret_borrow<tuple>(source);
            if (!memory.load(pair[0], convert) || !counters.load(pair[1], convert)) return false;
        } else {
            memory.load(source, convert);
        }
        value = {memory, counters};
        return true;
    }
};

template <>
struct pybind11::detail::type_caster<blip3o::Unused> {
    PYBIND11_TYPE_CASTER(blip3o::Unused, const_name("object"));

    bool load(handle, bool) { return true; }
};
