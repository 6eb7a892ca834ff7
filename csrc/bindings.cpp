// The Python face of the extension.
#include <pybind11/pybind11.h>

#include "cpu/register.h"

#ifdef VIGOS_CUDA
#include "cuda/register.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of vigos: pointers, sizes and strides in, nothing of torch.";
  m.attr("interface") = VIGOS_INTERFACE;
  vigos::register_cpu(m);
#ifdef VIGOS_CUDA
  vigos::register_cuda(m);
#endif
}
