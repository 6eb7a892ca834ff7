#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace vigos {

void register_divergence(pybind11::module_& m);

}  // namespace vigos
