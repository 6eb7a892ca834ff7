// The CPU engine's functions as Python sees them: pointers and strides as integers, checked by
// vigos/divergence/engines/cpu.py.
#include "register.h"

#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "divergence.h"
#include "threads.h"

namespace py = pybind11;

namespace vigos {
namespace {

using namespace cpu;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Matrix matrix(std::uintptr_t data, int dtype, int64_t ld, int64_t rows, int64_t columns) {
  return {pointer<const void>(data), static_cast<Dtype>(dtype), ld, rows, columns};
}

}  // namespace

void register_cpu(py::module_& m) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  using Address = std::uintptr_t;

  // module_local: another build of the extension may be loaded in the same process.
  py::class_<Matrix>(m, "Matrix", py::module_local(),
                     "Address, dtype (0 float32, 1 bfloat16, 2 float16), row stride, rows, columns.")
      .def(py::init(&matrix), py::arg("data"), py::arg("dtype"), py::arg("ld"), py::arg("rows"), py::arg("columns"));
  py::class_<Transforms>(m, "Transforms", py::module_local(),
                         "From both sides' raw logits to z: (alpha, inner, height).")
      .def(py::init([](std::array<float, 3> s, std::array<float, 3> t, bool difference) {
             Transforms f{{s[0], s[1], s[2]}, {t[0], t[1], t[2]}};
             f.difference = difference;
             return f;
           }),
           py::arg("student"), py::arg("teacher"), py::arg("difference"))
      .def(
          "set_biases",
          [](Transforms& f, Address bias_s, Address bias_t, Address bias_gap) {
            f.bias_s = pointer<const float>(bias_s);
            f.bias_t = pointer<const float>(bias_t);
            f.bias_gap = pointer<const float>(bias_gap);
          },
          py::arg("bias_s"), py::arg("bias_t"), py::arg("bias_gap"));
  py::class_<Options>(m, "Options", py::module_local(), "The share of JSD, and the clip of each entry's term or None.")
      .def(py::init([](float share, std::optional<float> clip) {
             return Options{share, clip.value_or(0.0f), clip.has_value()};
           }),
           py::arg("share"), py::arg("entry_clip"));
  py::class_<Chunk>(m, "Chunk", py::module_local(), "Logits (v, width) of both sides.")
      .def(py::init([](Address s, Address t, int64_t ld_s, int64_t ld_t, int64_t v, int64_t width, int64_t start) {
             return Chunk{pointer<float>(s), pointer<float>(t), ld_s, ld_t, v, width, start};
           }),
           py::arg("s"), py::arg("t"), py::arg("ld_s"), py::arg("ld_t"), py::arg("v"), py::arg("width"),
           py::arg("start") = 0);
  py::class_<Slopes>(m, "Slopes", py::module_local(),
                     "What chunk_measure left of a chunk's logits, and its live columns.")
      .def(py::init([](Address a, Address p_s, int64_t ld, int64_t width, Address mean_slope, Address live, int64_t n) {
             return Slopes{pointer<float>(a),          pointer<float>(p_s),    ld, width,
                           pointer<float>(mean_slope), pointer<int32_t>(live), n};
           }),
           py::arg("a"), py::arg("p_s"), py::arg("ld"), py::arg("width"), py::arg("mean_slope"), py::arg("live"),
           py::arg("n"));

  m.attr("dtypes") = py::dict(py::arg("float32") = static_cast<int>(Dtype::kFloat32),
                              py::arg("bfloat16") = static_cast<int>(Dtype::kBFloat16),
                              py::arg("float16") = static_cast<int>(Dtype::kFloat16));
  m.attr("kinds") =
      py::dict(py::arg("forward") = static_cast<int>(kForwardKL), py::arg("reverse") = static_cast<int>(kReverseKL),
               py::arg("jsd") = static_cast<int>(kJSD));
  m.def("isa", [] { return std::string(isa().name); }, "The instruction set in use: avx512, avx2 or portable.");
  m.def(
      "select_isa",
      [](const std::string& name) {
        if (!select_isa(name.c_str())) throw std::invalid_argument("this machine does not run " + name);
      },
      py::arg("name"), "Use a named instruction set, or the best one again with \"best\".");
  m.def(
      "multiply_add",
      [](int64_t n, int threads) {
        std::atomic<int64_t> operations{0};
        parallel_for(threads, threads, [&](int64_t) { operations += isa().multiply_add(n, 0.5f); });
        return operations.load();
      },
      py::arg("n"), py::arg("threads"), released, "Run n rounds of register arithmetic a thread; operations in all.");
  m.def("thread_backend", &thread_backend, "What threads come from: openmp (torch's own) or std::thread.");

  m.def(
      "project",
      [](const Matrix& head, Address x, int64_t ld_x, int64_t n, Address out, int64_t ld_out, int threads,
         const Chunk* chunk, const Transforms* f, Address sums) {
        const auto run = [&](const Statistics* s) {
          project(head, pointer<const float>(x), ld_x, n, pointer<float>(out), ld_out, s, threads);
        };
        if (chunk == nullptr) return run(nullptr);
        const Statistics statistics{*chunk, *f, pointer<double>(sums)};
        run(&statistics);
      },
      py::arg("head"), py::arg("x"), py::arg("ld_x"), py::arg("n"), py::arg("out"), py::arg("ld_out"),
      py::arg("threads"), py::arg("chunk") = nullptr, py::arg("transform") = nullptr, py::arg("sums") = 0, released);
  m.def(
      "backproject",
      [](const Slopes& g, const Matrix& head, Address out, int threads) {
        backproject(g, head, pointer<float>(out), threads);
      },
      py::arg("g"), py::arg("head"), py::arg("out"), py::arg("threads"), released);
  m.def(
      "accumulate_head",
      [](const Slopes& g, int64_t v, Address hidden, int64_t d, Address weight, Address out, Address bias,
         int threads) {
        accumulate_head(g, v, pointer<const float>(hidden), d, pointer<const float>(weight), pointer<float>(out),
                        pointer<float>(bias), threads);
      },
      py::arg("g"), py::arg("v"), py::arg("hidden"), py::arg("d"), py::arg("weight"), py::arg("out"), py::arg("bias"),
      py::arg("threads"), released);
  m.def(
      "chunk_statistics",
      [](const Chunk& chunk, const Transforms& f, Address sums, int threads) {
        chunk_statistics({chunk, f, pointer<double>(sums)}, threads);
      },
      py::arg("chunk"), py::arg("transform"), py::arg("sums"), py::arg("threads"), released);
  m.def(
      "chunk_measure",
      [](const Chunk& chunk, const Transforms& f, const Options& o, Address floats, Address kind, bool write,
         Address out, int threads) {
        chunk_measure(chunk, f, o, normalised(pointer<const float>(floats), chunk.width, pointer<const int32_t>(kind)),
                      write, pointer<double>(out), threads);
      },
      py::arg("chunk"), py::arg("transform"), py::arg("options"), py::arg("normalised"), py::arg("kind"),
      py::arg("write"), py::arg("out"), py::arg("threads"), released);
  m.def(
      "rows_forward",
      [](const Matrix& student, const Matrix& teacher, Address student_row, Address teacher_row, Address kind,
         int64_t n, int64_t v, const Transforms& f, const Options& o, Address out, int threads) {
        rows_forward(student, teacher, pointer<const int64_t>(student_row), pointer<const int64_t>(teacher_row),
                     pointer<const int32_t>(kind), n, v, f, o, pointer<double>(out), threads);
      },
      py::arg("student"), py::arg("teacher"), py::arg("student_row"), py::arg("teacher_row"), py::arg("kind"),
      py::arg("n"), py::arg("v"), py::arg("transform"), py::arg("options"), py::arg("out"), py::arg("threads"),
      released);
  m.def(
      "rows_backward",
      [](const Matrix& student, const Matrix& teacher, Address student_row, Address teacher_row, Address kind,
         Address state, int64_t ld_state, Address scale, int64_t n, int64_t v, const Transforms& f, const Options& o,
         const Matrix& out, bool add, int threads) {
        rows_backward(student, teacher, pointer<const int64_t>(student_row), pointer<const int64_t>(teacher_row),
                      pointer<const int32_t>(kind), pointer<const float>(state), ld_state, pointer<const float>(scale),
                      n, v, f, o, out, add, threads);
      },
      py::arg("student"), py::arg("teacher"), py::arg("student_row"), py::arg("teacher_row"), py::arg("kind"),
      py::arg("state"), py::arg("ld_state"), py::arg("scale"), py::arg("n"), py::arg("v"), py::arg("transform"),
      py::arg("options"), py::arg("out"), py::arg("add"), py::arg("threads"), released);
  m.def(
      "evaluate",
      [](int function, Address x, int64_t n, Address y) {
        isa().evaluate(function, pointer<const float>(x), n, pointer<float>(y));
      },
      py::arg("function"), py::arg("x"), py::arg("n"), py::arg("y"), released,
      "The vector functions, for their tests: 0 exp, 1 exp(-x) - 1, 2 log1p, 3 tanh.");
}

}  // namespace vigos
