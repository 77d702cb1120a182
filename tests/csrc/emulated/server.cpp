// Runs calls of the ops that arrive on standard input: how a test reaches kernels built for another processor.
//
// A call    name, newline; the memory that its tensors share, as int64 count, then int64 bytes and the bytes of
//           each (or minus its bytes: zeros that stay here); for every parameter of the op one byte: 0 nothing, 1 a tensor, 2 a number
// A tensor  int64 memory (-1: empty), byte offset, dtype (as DType), ndim, ndim sizes, ndim strides
// A number  float64
// An answer int64 0 and the bytes of all memory again, or int64 length and the text of the error
//
// With an argument it prints the names and parameters of the ops.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/launch.h"

using Memory = std::vector<std::vector<char>>;
Memory memory;  // of the call; another thread pool may watch it

using namespace blip3o;

namespace {

void read_bytes(void* to, size_t size) {
    if (size > 0 && std::fread(to, 1, size, stdin) != size) std::exit(0);  // the test is done
}

void write_bytes(const void* from, size_t size) { std::fwrite(from, 1, size, stdout); }

template <class T>
T read_value() {
    T value;
    read_bytes(&value, sizeof value);
    return value;
}

struct Reader {
    template <class T>
    T read() {
        const uint8_t kind = read_value<uint8_t>();
        if constexpr (std::is_same_v<T, TensorView>) {
            return tensor();
        } else if constexpr (std::is_same_v<T, OptionalView>) {
            return kind == 1 ? OptionalView(tensor()) : OptionalView();
        } else if constexpr (std::is_arithmetic_v<T>) {
            return static_cast<T>(read_value<double>());
        } else {
            return T{};  // Scratch, Unused
        }
    }

    TensorView tensor() {
        TensorView view;
        const int64_t place = read_value<int64_t>(), offset = read_value<int64_t>();
        if (place >= 0) view.data = memory[place].data() + offset;
        view.dtype = static_cast<DType>(read_value<int64_t>());
        view.device = Device::cpu;
        view.ndim = static_cast<int>(read_value<int64_t>());
        for (int i = 0; i < view.ndim; ++i) view.shape[i] = read_value<int64_t>();
        for (int i = 0; i < view.ndim; ++i) view.stride[i] = read_value<int64_t>();
        return view;
    }
};

template <class Arguments, class Launch, class... Views>
void call(Arguments (*check)(Device, Views...), const Launch& launch) {
    Reader reader;
    const std::tuple<std::decay_t<Views>...> values{reader.read<std::decay_t<Views>>()...};
    std::apply([&](const auto&... views) { launch(check(Device::cpu, views...)); }, values);
}

struct Collect {
    std::map<std::string, std::function<void()>> calls;
    std::map<std::string, std::string> parameters;

    template <class Op, class Launch>
    void add(const Launch& launch) {
        calls[Op::kName] = [launch] { call(&Op::check, launch); };
        parameters[Op::kName] = Op::kParameters;
    }
};

std::string read_name() {
    std::string name;
    for (char letter; (letter = read_value<char>()) != '\n';) name += letter;
    return name;
}

}  // namespace

int main(int count, char**) {
    Collect ops;
    cpu::for_each_op(ops);
    if (count > 1) {
        for (const auto& [name, parameters] : ops.parameters) {
            std::printf("%s\t%s\n", name.c_str(), parameters.c_str());
        }
        return 0;
    }
    cpu::set_num_threads(2);
    for (;;) {
        const auto& run = ops.calls.at(read_name());
        memory = Memory(read_value<int64_t>());
        std::vector<bool> sent(memory.size());
        for (size_t i = 0; i < memory.size(); ++i) {
            const int64_t size = read_value<int64_t>();
            sent[i] = size >= 0;
            memory[i].resize(sent[i] ? size : -size);
            if (sent[i]) read_bytes(memory[i].data(), size);
        }
        std::string error;
        try {
            run();
        } catch (const ArgumentError& refused) {
            error = refused.what();
        }
        const int64_t length = error.size();
        write_bytes(&length, sizeof length);
        write_bytes(error.data(), error.size());
        for (size_t i = 0; i < memory.size(); ++i) {
            if (length == 0 && sent[i]) write_bytes(memory[i].data(), memory[i].size());
        }
        std::fflush(stdout);
    }
}
