// A non-owning view of a tensor, and a matcher that checks views against a contract and names what is wrong.
//
//     Contract contract("rms_norm", Device::cpu);
//     Dim rows("rows"), width("D");
//     contract(x, "x").dtype({DType::f32, DType::bf16}).rows(rows, width);
//     contract(weight, "weight").dtype({x.dtype}).shape({&width});
//
// A Dim is bound by the first argument that uses it; a later one that disagrees is told so:
//     rms_norm: weight has shape [7]; accepted: [D = 8] (D as in x)
// All arguments of a call live on the device of the first one.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace blip3o {

enum class DType : uint8_t { f32, bf16, e4m3, i8, i32, i64, f64, f16, u8, boolean, other };

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
    uint16_t bits;
};

// A matrix whose rows are contiguous and lie `stride` elements apart. data is null for an absent optional.
struct Rows {
    void* data;
    int64_t count, width, stride;

    template <class T>
    __attribute__((always_inline)) T* row(int64_t index) const {
        return static_cast<T*>(data) + index * stride;
    }
};

enum class Device : uint8_t { cpu, cuda, other };

inline const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return "float32";
        case DType::bf16:
            return "bfloat16";
        case DType::e4m3:
            return "float8_e4m3fn";
        case DType::i8:
            return "int8";
        case DType::i32:
            return "int32";
        case DType::i64:
            return "int64";
        case DType::f64:
            return "float64";
        case DType::f16:
            return "float16";
        case DType::u8:
            return "uint8";
        case DType::boolean:
            return "bool";
        case DType::other:
            break;
    }
    return "that no op takes";
}

inline const char* name_of(Device device) {
    return device == Device::cpu ? "cpu" : device == Device::cuda ? "cuda" : "a device that no op runs on";
}

struct TensorView {
    static constexpr int kMaxDims = 8;

    void* data = nullptr;
    DType dtype = DType::other;
    Device device = Device::other;
    int device_index = 0;
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t stride[kMaxDims] = {};  // in elements
};

using OptionalView = std::optional<TensorView>;

constexpr DType dtype_of(const float*) { return DType::f32; }
constexpr DType dtype_of(const int32_t*) { return DType::i32; }
constexpr DType dtype_of(const int64_t*) { return DType::i64; }

inline constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::bf16};

// An argument broke an op's contract; the message is one line for people.
class ArgumentError : public std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// A dimension of a contract: a symbol bound by the first argument that uses it. (Names are string literals.)
class Dim {
  public:
    explicit Dim(const char* name) : name_(name) {}

    int64_t value() const { return value_; }

    bool accepts(int64_t size, const char* argument) {
        if (value_ < 0) {
            value_ = size;
            bound_by_ = argument;
        }
        return value_ == size;
    }

    // "D", or "D = 8" once another argument has bound it.
    std::string describe(const char* argument) const {
        return bound_before(argument) ? std::string(name_) + " = " + std::to_string(value_) : name_;
    }

    // "D as in x", or nothing where `argument` itself bound it.
    std::string origin(const char* argument) const {
        return bound_before(argument) ? std::string(name_) + " as in " + bound_by_ : "";
    }

  private:
    bool bound_before(const char* argument) const { return value_ >= 0 && bound_by_ != argument; }

    const char* name_;
    int64_t value_ = -1;
    const char* bound_by_ = "";
};

// One argument being checked. Every check returns the argument again, or throws ArgumentError.
class Argument {
  public:
    Argument(const char* op, const TensorView* view, const char* name) : op_(op), view_(view), name_(name) {}

    const Argument& on(Device device) const {
        if (view_ && view_->device != device) {
            fail(std::string("is on ") + name_of(view_->device) + "; accepted: " + name_of(device));
        }
        return *this;
    }

    const Argument& beside(const TensorView& first, const char* first_name) const {
        if (view_ && view_->device == Device::cuda && view_->device_index != first.device_index) {
            fail("is on cuda:" + std::to_string(view_->device_index) +
                 "; accepted: cuda:" + std::to_string(first.device_index) + " (as " + first_name + ")");
        }
        return *this;
    }

    const Argument& dtype(std::initializer_list<DType> accepted) const {
        if (!view_) return *this;
        std::string names;
        for (DType dtype : accepted) {
            if (view_->dtype == dtype) return *this;
            if (names.find(name_of(dtype)) != std::string::npos) continue;
            names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
        }
        fail(std::string("has dtype ") + name_of(view_->dtype) + "; accepted: " + names);
    }

    const Argument& shape(std::initializer_list<Dim*> dims) const {
        if (!view_) return *this;
        bool matches = view_->ndim == static_cast<int>(dims.size());
        for (int i = 0; matches && i < view_->ndim; ++i) {
            matches = dims.begin()[i]->accepts(view_->shape[i], name_);
        }
        if (!matches) fail_shape(dims, "");
        return *this;
    }

    const Argument& contiguous() const {
        if (!view_) return *this;
        int64_t expected = 1;
        for (int i = view_->ndim - 1; i >= 0; --i) {
            if (view_->shape[i] != 1 && view_->stride[i] != expected) {
                fail("has strides " + list(view_->stride, view_->ndim) + " for shape " +
                     list(view_->shape, view_->ndim) + "; accepted: contiguous (call .contiguous())");
            }
            expected *= view_->shape[i];
        }
        return *this;
    }

    // A contiguous tensor: where it begins, or null for an absent optional.
    void* array(DType accepted, std::initializer_list<Dim*> dims) const {
        dtype({accepted}).shape(dims).contiguous();
        return view_ ? view_->data : nullptr;
    }

    // The same of float, int32_t or int64_t.
    template <class T>
    T* array(std::initializer_list<Dim*> dims) const {
        return static_cast<T*>(array(dtype_of(static_cast<const T*>(nullptr)), dims));
    }

    // Any number of leading dimensions, seen as `count` rows of contiguous elements at a constant distance.
    Rows rows(Dim& count, Dim& width) const {
        if (!view_) return {};
        const int last = view_->ndim - 1;
        if (last < 0) fail_shape({&count, &width}, "");
        int64_t total = 1;
        for (int i = 0; i < last; ++i) total *= view_->shape[i];
        if (!count.accepts(total, name_) || !width.accepts(view_->shape[last], name_)) {
            fail_shape({&count, &width}, ", leading dimensions flattened");
        }
        return {view_->data, total, view_->shape[last], row_stride()};
    }

  private:
    int64_t row_stride() const {
        const int last = view_->ndim - 1;
        bool uniform = view_->stride[last] == 1 || view_->shape[last] == 1;
        int64_t stride = view_->shape[last], extent = 1;  // rows so far and the distance between them
        for (int i = last - 1; i >= 0; --i) {
            if (view_->shape[i] == 1) continue;
            if (extent == 1) stride = view_->stride[i];
            uniform = uniform && view_->stride[i] == stride * extent;
            extent *= view_->shape[i];
        }
        if (!uniform) {
            fail("has strides " + list(view_->stride, view_->ndim) + " for shape " +
                 list(view_->shape, view_->ndim) +
                 "; accepted: contiguous rows at one distance (call .contiguous())");
        }
        return stride;
    }

    static std::string list(const int64_t* values, int count) {
        std::string text = "[";
        for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
        return text + "]";
    }

    [[noreturn]] void fail(const std::string& what) const {
        throw ArgumentError(std::string(op_) + ": " + name_ + " " + what);
    }

    [[noreturn]] void fail_shape(std::initializer_list<Dim*> dims, const char* note) const {
        std::string wanted, origins;
        for (const Dim* dim : dims) {
            wanted += (wanted.empty() ? "" : ", ") + dim->describe(name_);
            const std::string origin = dim->origin(name_);
            if (!origin.empty() && origins.find(origin) == std::string::npos) {
                origins += (origins.empty() ? " (" : ", ") + origin;
            }
        }
        if (!origins.empty()) origins += ")";
        fail("has shape " + list(view_->shape, view_->ndim) + "; accepted: [" + wanted + "]" + note +
             origins);
    }

    const char* op_;
    const TensorView* view_;
    const char* name_;
};

// The arguments of one call of an op, which live on one device.
class Contract {
  public:
    Contract(const char* op, Device device) : op_(op), device_(device) {}

    Argument operator()(const TensorView& view, const char* name) { return argument_on_device(&view, name); }

    // An absent optional argument passes every check.
    Argument operator()(const std::optional<TensorView>& view, const char* name) {
        return argument_on_device(view ? &*view : nullptr, name);
    }

    // A condition on numbers rather than on one tensor.
    void require(bool condition, const char* what) const {
        if (!condition) throw ArgumentError(std::string(op_) + ": " + what);
    }

    // Two matrices that must not begin at the same address, unless they are empty.
    void require_apart(const Rows& one, const char* name, const Rows& other, const char* other_name) const {
        if (other.count == 0 || other.width == 0 || one.data != other.data) return;
        throw ArgumentError(std::string(op_) + ": " + name + " must not be the memory of " + other_name +
                            "; give it memory of its own");
    }

  private:
    Argument argument_on_device(const TensorView* view, const char* name) {
        const Argument argument(op_, view, name);
        argument.on(device_);
        if (first_) {
            argument.beside(*first_, first_name_);
        } else {
            first_ = view;
            first_name_ = name;
        }
        return argument;
    }

    const char* op_;
    Device device_;
    const TensorView* first_ = nullptr;
    const char* first_name_ = "";
};

// The element `argument`[i] or `argument`[i, j] of a tensor must be least .. most, which are `what`.
inline void check_element(const char* op, const char* argument, int64_t i, int64_t j, int64_t value,
                          int64_t least, int64_t most, const char* what) {
    if (value >= least && value <= most) return;
    const std::string index = std::to_string(i) + (j < 0 ? "" : ", " + std::to_string(j));
    throw ArgumentError(std::string(op) + ": " + argument + "[" + index + "] is " + std::to_string(value) +
                        "; accepted: " + std::to_string(least) + " to " + std::to_string(most) + ", " + what);
}

inline void check_element(const char* op, const char* argument, int64_t i, int64_t value, int64_t least,
                          int64_t most, const char* what) {
    check_element(op, argument, i, -1, value, least, most, what);
}

}  // namespace blip3o
