// Python module simt_kernels: opens a library made of entry.cpp and calls its kernels on CPU tensors, with
// the arguments of blip3o_rt._cuda.
#include <dlfcn.h>

#include "blip3o/contracts.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace blip3o::bindings {
namespace {

class Library {
  public:
    explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (!handle_) throw std::runtime_error(dlerror());
    }

    void set_descending(bool descending) const { find<void(bool)>("simt_set_descending")(descending); }

    void rms_norm(const TensorView& x, const TensorView& weight, double eps, const OptionalView& bias,
                  const OptionalView& residual, const TensorView& out) const {
        const auto arguments = check_rms_norm(Device::cpu, x, weight, eps, bias, residual, out);
        find<void(const RmsNormArguments&)>("simt_rms_norm")(arguments);
    }

  private:
    template <class Function>
    Function* find(const char* name) const {
        return reinterpret_cast<Function*>(dlsym(handle_, name));
    }

    void* handle_;  // never closed: the library lives with the process
};

}  // namespace

PYBIND11_MODULE(simt_kernels, module) {
    translate_argument_errors();
    py::class_<Library>(module, "Library")
        .def(py::init<const std::string&>())
        .def("set_descending", &Library::set_descending)
        .def("rms_norm", &Library::rms_norm);
}

}  // namespace blip3o::bindings
