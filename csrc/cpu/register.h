#pragma once

#include <pybind11/pybind11.h>

namespace vigos {

// Adds the functions of the CPU engine.
void register_cpu(pybind11::module_& m);

}  // namespace vigos
