// The Python face of the extension: the one file that knows pybind11.
#include <pybind11/pybind11.h>

#ifdef VIGOS_CUDA
#include "cuda/register.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of vigos: pointers, sizes and strides in, nothing of torch.";
#ifdef VIGOS_CUDA
  vigos::register_cuda(m);
#endif
}
