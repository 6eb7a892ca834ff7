// vigos._C.cuda: the CUDA launchers for Python. Pointers are integers (Tensor.data_ptr()), 0 for none; strides count
// elements; `stream` is the integer of a cudaStream_t. Bad arguments raise ValueError, a failed launch RuntimeError.
#include "register.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

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
  throw std::invalid_argument(std::string(argument) + " must be float32, float16 or bfloat16, got " + name);
}

using Constants = std::array<float, 3>;  // alpha, inner, height

Transform transform_of(const Constants& f, const char* argument) {
  if (!(f[0] > 0.0f)) {
    throw std::invalid_argument(std::string(argument) + " must have alpha > 0, got " + std::to_string(f[0]));
  }
  return {f[0], f[1], f[2]};
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
      "logits_rows",
      [](Address student, Address teacher, Address dlogits, Address student_row, Address teacher_row, Address kind,
         Address weight, Address clip, Address student_bias, Address teacher_bias, Address labels, Address divergence,
         Address clipped, Address student_entropy, Address teacher_entropy, Address student_lse, Address teacher_lse,
         Address student_logprob, Address teacher_logprob, Address state, int64_t rows, int64_t vocab,
         int64_t logical_vocab, int64_t stride_student, int64_t stride_teacher, int64_t stride_dlogits,
         bool dlogits_by_student_row, const Constants& student_transform, const Constants& teacher_transform,
         float beta, float entry_clip, const std::string& dtype, const std::string& gradient_dtype,
         const std::string& path, Address stream) {
        LogitsRowsParams p;
        p.student = pointer<const void>(student);
        p.teacher = pointer<const void>(teacher);
        p.dlogits = pointer<void>(dlogits);
        p.student_row = pointer<const int64_t>(student_row);
        p.teacher_row = pointer<const int64_t>(teacher_row);
        p.kind = pointer<const int8_t>(kind);
        p.weight = pointer<const float>(weight);
        p.clip = pointer<const float>(clip);
        p.student_bias = pointer<const float>(student_bias);
        p.teacher_bias = pointer<const float>(teacher_bias);
        p.labels = pointer<const int64_t>(labels);
        p.divergence = pointer<float>(divergence);
        p.clipped = pointer<uint8_t>(clipped);
        p.student_entropy = pointer<float>(student_entropy);
        p.teacher_entropy = pointer<float>(teacher_entropy);
        p.student_lse = pointer<float>(student_lse);
        p.teacher_lse = pointer<float>(teacher_lse);
        p.student_logprob = pointer<float>(student_logprob);
        p.teacher_logprob = pointer<float>(teacher_logprob);
        p.state = pointer<float>(state);
        p.rows = rows;
        p.vocab = vocab;
        p.logical_vocab = logical_vocab;
        p.stride_student = stride_student;
        p.stride_teacher = stride_teacher;
        p.stride_dlogits = stride_dlogits;
        p.dlogits_by_student_row = dlogits_by_student_row;
        p.student_transform = transform_of(student_transform, "student_transform");
        p.teacher_transform = transform_of(teacher_transform, "teacher_transform");
        p.beta = beta;
        p.entry_clip = entry_clip;
        logits_rows(p, dtype_of(dtype, "dtype"), dtype_of(gradient_dtype, "gradient_dtype"), path.c_str(),
                    pointer<void>(stream));
      },
      py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("dlogits") = 0, py::arg("student_row") = 0,
      py::arg("teacher_row") = 0, py::arg("kind"), py::arg("weight"), py::arg("clip"), py::arg("student_bias") = 0,
      py::arg("teacher_bias") = 0, py::arg("labels") = 0, py::arg("divergence"), py::arg("clipped"),
      py::arg("student_entropy"), py::arg("teacher_entropy"), py::arg("student_lse"), py::arg("teacher_lse"),
      py::arg("student_logprob") = 0, py::arg("teacher_logprob") = 0, py::arg("state") = 0, py::arg("rows"),
      py::arg("vocab"), py::arg("logical_vocab"), py::arg("stride_student"), py::arg("stride_teacher"),
      py::arg("stride_dlogits") = 0, py::arg("dlogits_by_student_row") = false,
      py::arg("student_transform") = Constants{1.0f, 0.0f, 0.0f},
      py::arg("teacher_transform") = Constants{1.0f, 0.0f, 0.0f}, py::arg("beta") = 0.5f,
      py::arg("entry_clip") = INFINITY, py::arg("dtype"), py::arg("gradient_dtype"), py::arg("path") = "auto",
      py::arg("stream") = 0,
      "Statistics, and with dlogits the gradient, of `rows` supervised rows: see logits_rows.h.");

  m.def(
      "logits_gradient",
      [](Address student, Address teacher, Address dlogits, Address order, Address offsets, Address teacher_row,
         Address kind, Address row_grad, Address state, Address student_bias, Address teacher_bias, int64_t rows,
         int64_t vocab, int64_t logical_vocab, int64_t stride_student, int64_t stride_teacher, int64_t stride_dlogits,
         const Constants& student_transform, const Constants& teacher_transform, float beta, float entry_clip,
         const std::string& dtype, Address stream) {
        LogitsGradientParams p;
        p.student = pointer<const void>(student);
        p.teacher = pointer<const void>(teacher);
        p.dlogits = pointer<void>(dlogits);
        p.order = pointer<const int64_t>(order);
        p.offsets = pointer<const int64_t>(offsets);
        p.teacher_row = pointer<const int64_t>(teacher_row);
        p.kind = pointer<const int8_t>(kind);
        p.row_grad = pointer<const float>(row_grad);
        p.state = pointer<const float>(state);
        p.student_bias = pointer<const float>(student_bias);
        p.teacher_bias = pointer<const float>(teacher_bias);
        p.rows = rows;
        p.vocab = vocab;
        p.logical_vocab = logical_vocab;
        p.stride_student = stride_student;
        p.stride_teacher = stride_teacher;
        p.stride_dlogits = stride_dlogits;
        p.student_transform = transform_of(student_transform, "student_transform");
        p.teacher_transform = transform_of(teacher_transform, "teacher_transform");
        p.beta = beta;
        p.entry_clip = entry_clip;
        logits_gradient(p, dtype_of(dtype, "dtype"), pointer<void>(stream));
      },
      py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("dlogits"), py::arg("order"), py::arg("offsets"),
      py::arg("teacher_row"), py::arg("kind"), py::arg("row_grad"), py::arg("state"), py::arg("student_bias") = 0,
      py::arg("teacher_bias") = 0, py::arg("rows"), py::arg("vocab"), py::arg("logical_vocab"),
      py::arg("stride_student"), py::arg("stride_teacher"), py::arg("stride_dlogits"),
      py::arg("student_transform") = Constants{1.0f, 0.0f, 0.0f},
      py::arg("teacher_transform") = Constants{1.0f, 0.0f, 0.0f}, py::arg("beta") = 0.5f,
      py::arg("entry_clip") = INFINITY, py::arg("dtype"), py::arg("stream") = 0,
      "The gradient of `rows` student rows from saved states.");
}

}  // namespace vigos
