// Python module simt_kernels: opens a library made of entry.cpp and calls its op on CPU tensors, with the
// arguments of blip3o_rt._cuda.
#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cuda_runtime.h>

#include "cuda/ops.h"
#include "define_op.h"
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

    void set_multiprocessors(int count) const { find<void(int)>("simt_set_multiprocessors")(count); }

    void set_shared_memory(int bytes) const { find<void(int)>("simt_set_shared_memory")(bytes); }

    void set_ptx_version(int version) const { find<void(int)>("simt_set_ptx_version")(version); }

    void set_dependent_launches(bool on) const { find<void(bool)>("simt_set_dependent_launches")(on); }

    int dependent_launches() const { return find<int()>("simt_dependent_launches")(); }

    // memory: addresses and bytes.
    void set_produced(const std::vector<std::pair<uintptr_t, size_t>>& memory) const {
        find<void(const std::pair<uintptr_t, size_t>*, size_t)>("simt_set_produced")(memory.data(),
                                                                                     memory.size());
    }

    template <class Arguments>
    void call(const Arguments& arguments, const Scratch& scratch) const {
        const cuda::LaunchScratch attention = {scratch.memory.data,
                                               static_cast<unsigned*>(scratch.counters.data)};
        find<void(const void*, const void*)>("simt_call")(&arguments, &attention);
    }

  private:
    template <class Function>
    Function* find(const char* name) const {
        return reinterpret_cast<Function*>(dlsym(handle_, name));
    }

    void* handle_;  // never closed: the library lives with the process
};

const Scratch& scratch_of() {
    static const Scratch none;
    return none;
}

// The scratch memory among the arguments of an op, or none.
template <class View, class... Views>
const Scratch& scratch_of(const View& view, const Views&... views) {
    if constexpr (std::is_same_v<View, Scratch>) return view;
    return scratch_of(views...);
}

template <class Op, class Arguments, class... Views>
void define(py::class_<Library>& library, Arguments (*check)(Device, Views...)) {
    const auto method = [=](const Library& self, Views... views) {
        self.call(check(Device::cpu, views...), scratch_of(views...));
    };
    library.def(Op::kName, method, Parameters(Op::kParameters));
}

}  // namespace

PYBIND11_MODULE(simt_kernels, module) {
    translate_argument_errors();
    module.def("attention_workspace", &cuda::attention_workspace);
    module.def("sample_tokens_workspace", &cuda::sample_tokens_workspace);
    py::class_<Library> library(module, "Library");
    library.def(py::init<const std::string&>())
        .def("set_descending", &Library::set_descending)
        .def("set_multiprocessors", &Library::set_multiprocessors)
        .def("set_shared_memory", &Library::set_shared_memory)
        .def("set_ptx_version", &Library::set_ptx_version)
        .def("set_dependent_launches", &Library::set_dependent_launches)
        .def("set_produced", &Library::set_produced)
        .def("dependent_launches", &Library::dependent_launches);
    define<AdvanceWindows>(library, &AdvanceWindows::check);
    define<DecodeAttention>(library, &DecodeAttention::check);
    define<NormRowLinear>(library, &NormRowLinear::check);
    define<PagedDecodeAttention>(library, &PagedDecodeAttention::check);
    define<PagedPrefillAttention>(library, &PagedPrefillAttention::check);
    define<QkNormRopeAppend>(library, &QkNormRopeAppend::check);
    define<RmsNorm>(library, &RmsNorm::check);
    define<RmsNormKeep>(library, &RmsNormKeep::check);
    define<RowLinear>(library, &RowLinear::check);
    define<RowLinearAdd>(library, &RowLinearAdd::check);
    define<RowLinearW8>(library, &RowLinearW8::check);
    define<SampleTokens>(library, &SampleTokens::check);
    define<SiluMul>(library, &SiluMul::check);
}

}  // namespace blip3o::bindings
