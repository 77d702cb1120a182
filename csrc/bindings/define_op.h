// Defines ops as functions of a module, under the names and with the parameters that their headers state.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "blip3o/op.h"

namespace blip3o::bindings {

namespace py = pybind11;

// Parameters as Python writes them: "x, weight, *, bias=None, gated=False, out".
class Parameters {
  public:
    explicit Parameters(const std::string& text) {
        for (size_t begin = 0; begin < text.size();) {
            const size_t end = std::min(text.find(", ", begin), text.size());
            const std::string parameter = text.substr(begin, end - begin);
            const size_t name_end = std::min(parameter.find('='), parameter.size());
            parameters_.emplace_back(parameter.substr(0, name_end), parameter.substr(name_end));
            begin = end + 2;
        }
    }

    // What pybind11's own annotations do, whose number and kinds would have to be known to the compiler.
    void annotate(py::detail::function_record* function) const {
        using namespace py::detail;
        const size_t count = function->nargs_pos;  // of all parameters, until some are by name only
        for (const auto& [name, value] : parameters_) {
            if (name == "*") {
                process_attribute<py::kw_only>::init(py::kw_only(), function);
            } else if (value.empty()) {
                process_attribute<py::arg>::init(py::arg(name.c_str()), function);
            } else {
                const py::object given =
                    value == "=False" ? py::object(py::bool_(false)) : py::object(py::none());
                process_attribute<py::arg_v>::init(py::arg(name.c_str()) = given, function);
            }
        }
        if (function->args.size() != count) {
            throw std::logic_error(std::string(function->name) + ": kParameters are not those of check");
        }
    }

  private:
    std::vector<std::pair<std::string, std::string>> parameters_;  // name, and "=value" or nothing
};

// A function (views...) that checks an op's arguments on `device` and calls launch(arguments).
template <class Launch, class Arguments, class... Views>
auto checked(Arguments (*check)(Device, Views...), Device device, Launch launch) {
    return [=](Views... views) { launch(check(device, views...)); };
}

}  // namespace blip3o::bindings

template <>
struct pybind11::detail::process_attribute<blip3o::bindings::Parameters>
    : process_attribute_default<blip3o::bindings::Parameters> {
    static void init(const blip3o::bindings::Parameters& parameters, function_record* function) {
        parameters.annotate(function);
    }
};
