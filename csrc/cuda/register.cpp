// vigos._C.cuda: the CUDA launchers for Python. Pointers are integers (Tensor.data_ptr()), 0 for none; strides count
// elements; `stream` is the integer of a cudaStream_t. Bad arguments raise ValueError, a failed launch RuntimeError.
#include "register.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "linear_hopper.h"
#include "logits_rows.h"

namespace py = pybind11;

namespace vigos {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(const std::string& name, const char* argument) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "stored_pair") return Dtype::kStoredPair;
  throw std::invalid_argument(std::string(argument) + " must be float32, float16, bfloat16 or stored_pair, got " +
                              name);
}

using Constants = std::array<float, 3>;  // alpha, inner, height

// Makes a member an attribute: pointers as integers, transforms as three numbers.
template <typename P, typename T>
void field(py::class_<P>& c, const char* name, T P::* member) {
  if constexpr (std::is_pointer_v<T>) {
    c.def_property(
        name, [member](const P& p) { return reinterpret_cast<Address>(p.*member); },
        [member](P& p, Address address) { p.*member = pointer<std::remove_pointer_t<T>>(address); });
  } else if constexpr (std::is_same_v<T, Transform>) {
    c.def_property(
        name, [member](const P& p) { return Constants{(p.*member).alpha, (p.*member).inner, (p.*member).height}; },
        [member](P& p, const Constants& f) { p.*member = {f[0], f[1], f[2]}; });
  } else {
    c.def_readwrite(name, member);
  }
}

// A struct made by naming the members that differ from their defaults.
template <typename P>
py::class_<P> params(py::module_& m, const char* name) {
  return py::class_<P>(m, name, py::module_local()).def(py::init([](const py::kwargs& fields) {
    auto p = std::make_unique<P>();
    const py::object self = py::cast(p.get(), py::return_value_policy::reference);
    for (const auto& [key, value] : fields) py::setattr(self, key, value);
    return *p;
  }));
}

}  // namespace

void register_cuda(py::module_& parent) {
  py::module_ m = parent.def_submodule("cuda", "CUDA launchers: pointers, sizes, strides in elements, and a stream.");
  m.attr("architectures") = VIGOS_CUDA_ARCHITECTURES;
  m.attr("row_state") = static_cast<int>(State::kColumns);

  m.def(
      "logits_rows_plan",
      [](int64_t vocab, const std::string& dtype, int compute_capability, int64_t shared_limit) {
        const LogitsRowsPlan plan = logits_rows_plan(vocab, dtype_of(dtype, "dtype"), compute_capability, shared_limit);
        return py::make_tuple(plan.resident, plan.cluster, plan.shared_bytes);
      },
      py::arg("vocab"), py::arg("dtype"), py::arg("compute_capability"), py::arg("shared_limit"),
      "(resident, blocks a row, bytes of shared memory a block)");

  m.def(
      "logits_rows_stay",
      [](int64_t vocab, const std::string& dtype) { return logits_rows_stay(vocab, dtype_of(dtype, "dtype")); },
      py::arg("vocab"), py::arg("dtype"), "Whether rows stay in shared memory on the current device.");

#define VIGOS_FIELD(name) field(c, #name, &P::name)
  {
    using P = LogitsRowsParams;
    auto c = params<P>(m, "LogitsRowsParams");
    VIGOS_FIELD(student);
    VIGOS_FIELD(teacher);
    VIGOS_FIELD(dlogits);
    VIGOS_FIELD(student_row);
    VIGOS_FIELD(teacher_row);
    VIGOS_FIELD(dlogits_row);
    VIGOS_FIELD(kind);
    VIGOS_FIELD(weight);
    VIGOS_FIELD(clip);
    VIGOS_FIELD(student_bias);
    VIGOS_FIELD(teacher_bias);
    VIGOS_FIELD(labels);
    VIGOS_FIELD(divergence);
    VIGOS_FIELD(clipped);
    VIGOS_FIELD(student_entropy);
    VIGOS_FIELD(teacher_entropy);
    VIGOS_FIELD(student_lse);
    VIGOS_FIELD(teacher_lse);
    VIGOS_FIELD(student_logprob);
    VIGOS_FIELD(teacher_logprob);
    VIGOS_FIELD(state);
    VIGOS_FIELD(rows);
    VIGOS_FIELD(vocab);
    VIGOS_FIELD(logical_vocab);
    VIGOS_FIELD(stride_student);
    VIGOS_FIELD(stride_teacher);
    VIGOS_FIELD(stride_dlogits);
    VIGOS_FIELD(student_transform);
    VIGOS_FIELD(teacher_transform);
    VIGOS_FIELD(share);
    VIGOS_FIELD(entry_clip);
  }
  {
    using P = LogitsGradientParams;
    auto c = params<P>(m, "LogitsGradientParams");
    VIGOS_FIELD(student);
    VIGOS_FIELD(teacher);
    VIGOS_FIELD(dlogits);
    VIGOS_FIELD(order);
    VIGOS_FIELD(offsets);
    VIGOS_FIELD(teacher_row);
    VIGOS_FIELD(kind);
    VIGOS_FIELD(row_grad);
    VIGOS_FIELD(kept);
    VIGOS_FIELD(state);
    VIGOS_FIELD(student_bias);
    VIGOS_FIELD(teacher_bias);
    VIGOS_FIELD(rows);
    VIGOS_FIELD(vocab);
    VIGOS_FIELD(logical_vocab);
    VIGOS_FIELD(stride_student);
    VIGOS_FIELD(stride_teacher);
    VIGOS_FIELD(stride_dlogits);
    VIGOS_FIELD(student_transform);
    VIGOS_FIELD(teacher_transform);
    VIGOS_FIELD(share);
    VIGOS_FIELD(entry_clip);
  }
  {
    using P = PairProductParams;
    auto c = params<P>(m, "PairProductParams");
    VIGOS_FIELD(student_hidden);
    VIGOS_FIELD(teacher_hidden);
    VIGOS_FIELD(student_weight);
    VIGOS_FIELD(teacher_weight);
    VIGOS_FIELD(pairs);
    VIGOS_FIELD(tops);
    VIGOS_FIELD(stride_student_hidden);
    VIGOS_FIELD(stride_teacher_hidden);
    VIGOS_FIELD(stride_student_weight);
    VIGOS_FIELD(stride_teacher_weight);
    VIGOS_FIELD(stride_pairs);
    VIGOS_FIELD(stride_tops);
    VIGOS_FIELD(d);
    VIGOS_FIELD(d_t);
    VIGOS_FIELD(rows);
    VIGOS_FIELD(vocab);
    VIGOS_FIELD(logical_vocab);
  }
#undef VIGOS_FIELD

  m.def(
      "logits_rows",
      [](const LogitsRowsParams& p, const std::string& dtype, const std::string& gradient_dtype,
         const std::string& path, Address stream) {
        logits_rows(p, dtype_of(dtype, "dtype"), dtype_of(gradient_dtype, "gradient_dtype"), path.c_str(),
                    pointer<void>(stream));
      },
      py::arg("params"), py::kw_only(), py::arg("dtype"), py::arg("gradient_dtype"), py::arg("path") = "auto",
      py::arg("stream") = 0,
      "Statistics, and with dlogits the gradient, of `rows` supervised rows: see logits_rows.h.");
  m.def(
      "logits_gradient",
      [](const LogitsGradientParams& p, const std::string& dtype, Address stream) {
        logits_gradient(p, dtype_of(dtype, "dtype"), pointer<void>(stream));
      },
      py::arg("params"), py::kw_only(), py::arg("dtype"), py::arg("stream") = 0,
      "The gradient of `rows` student rows from saved states.");
  m.def(
      "pair_product",
      [](const PairProductParams& p, const std::string& dtype, Address stream) {
        pair_product(p, dtype_of(dtype, "dtype"), pointer<void>(stream));
      },
      py::arg("params"), py::kw_only(), py::arg("dtype"), py::arg("stream") = 0,
      "Logits of both sides as pairs of fp16 numbers, on compute capability 9.0: see linear_hopper.h.");
}

}  // namespace vigos
