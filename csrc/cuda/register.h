#pragma once

#include <pybind11/pybind11.h>

namespace vigos {

// Adds the submodule `cuda`.
void register_cuda(pybind11::module_& parent);

}  // namespace vigos
