// The CPU row kernels and the matrix products around them: what bindings and the per-instruction-set sources share.
//
// Logits of a chunk lie as (V, columns): one supervised row is a column, and SIMD lanes are neighbouring columns. Rows
// of logits that a caller brings, (N, V), are walked as 16 interleaved columns of the same row.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace vigos::cpu {

// From both sides' raw logits to z.
struct Transforms {
  Transform student, teacher;
  const float* bias_s = nullptr;  // (V,), both or neither
  const float* bias_t = nullptr;
  const float* bias_gap = nullptr;  // bias_s - bias_t, 0 where both are -inf
  bool difference = false;          // the student's raw logits are given as raw_s - raw_t; the transforms are alike
};

struct Options {
  float share = 0.5f;       // as Row::share
  float entry_clip = 0.0f;  // used if has_clip
  bool has_clip = false;
};

// Sums over part of the vocabulary for one column. Maxima are relative to nothing, sums to the maximum.
struct ColumnStatistics {
  double top_s, top_t;      // max z
  double total_s, total_t;  // sum exp(z - top)
  double first_s, first_t;  // sum exp(z - top) (z - top)
};

// Columns of what the second and third visits know of a row, as in vigos/divergence/engines/problem.py.
struct Known {
  enum : int { kTopS, kLogSumS, kTopT, kLogSumT, kLseGap, kMeanSlope, kColumns };
};

// Columns of what rows_forward writes: those, then the row's statistics.
struct RowOutput {
  enum : int { kDivergence = Known::kColumns, kEntropyS, kEntropyT, kLseS, kLseT, kColumns };
};

// What the second and third visits know of each column; arrays of `width` entries.
struct Normalised {
  const float* top_s;
  const float* top_t;
  const float* log_sum_s;
  const float* log_sum_t;
  const float* lse_gap;     // L_s - L_t
  const float* mean_slope;  // S, the sum of a; third visit only
  const int32_t* kind;
};

// Rows of `floats` (Known::kColumns, width).
inline Normalised normalised(const float* floats, int64_t width, const int32_t* kind) {
  const auto row = [&](int column) { return floats + column * width; };
  return {row(Known::kTopS),
          row(Known::kTopT),
          row(Known::kLogSumS),
          row(Known::kLogSumT),
          row(Known::kLseGap),
          row(Known::kMeanSlope),
          kind};
}

// One visit's view of a block of logits: steps x lanes, `lanes` a multiple of 16.
struct View {
  const float* s;
  const float* t;
  int64_t ld_s, ld_t;  // floats from one step to the next
  int64_t start;       // index into the biases of the first step
  int64_t steps;
  int64_t lanes;
};

// Rows of memory to bring into the second-level cache: `lines` cache lines of each, `stride` bytes apart.
struct Prefetch {
  const char* data = nullptr;
  int64_t rows = 0, lines = 1, stride = 0;
};

// The functions of one instruction set.
struct Isa {
  const char* name;
  int panel;      // columns of a packed panel of the matrix products
  int tile_rows;  // rows of a tile of them

  // First visit: adds a view to the running statistics of its columns.
  void (*statistics)(const View&, const Transforms&, ColumnStatistics*);
  // Second visit: value[c] += the divergence's terms, gradient[c] += the terms of S.
  void (*measure)(const View&, const Transforms&, const Options&, const Normalised&, double* value, double* gradient);
  // Third visit: d divergence / d raw student logit, (steps, lanes) to out (row stride ld_out), times scale[c].
  void (*gradient)(const View&, const Transforms&, const Options&, const Normalised&, const float* scale, float* out,
                   int64_t ld_out);
  // Rows of any dtype to and from float32.
  void (*widen)(const void* from, Dtype dtype, int64_t n, float* dest);
  void (*narrow)(const float* from, int64_t n, void* dest, Dtype dtype);
  // Columns of the right operand, B(k, j) = x[j * ld + k], into panels.
  void (*pack_rows)(const float* x, int64_t ld, int64_t k, int64_t n, float* dest);
  // Rows of it, B(k, j) = x[k * ld + j] of any dtype, into panels.
  void (*pack_columns)(const void* x, Dtype dtype, int64_t ld, int64_t k, int64_t n, float* dest);
  // Columns of the left operand, A(i, k) = x[k * ld + i], into tiles; room for m + rows - 1 rows.
  void (*pack_tiles)(const float* x, int64_t ld, int64_t k, int64_t m, float* dest);
  // c (m, n) = or += A (m, k) @ packed panels, A(i, k) = a[i * ld + k].
  void (*multiply)(const float* a, int64_t ld, const float* packed, int64_t m, int64_t n, int64_t k, float* c,
                   int64_t ld_c, bool add);
  // The same from tiles, over a depth k in one piece; what comes next is fetched meanwhile.
  void (*multiply_tiles)(const float* tiles, const float* packed, int64_t m, int64_t n, int64_t k, float* c,
                         int64_t ld_c, bool add, const Prefetch& next);
  // The functions of simd.h, for their tests: 0 exp, 1 expm1(-x), 2 log1p, 3 tanh.
  void (*evaluate)(int function, const float* x, int64_t n, float* y);
};

const Isa& isa_portable();
#ifdef VIGOS_X86
const Isa& isa_avx2();
const Isa& isa_avx512();
#endif

// The best one this machine runs, or the one `select_isa` named; false if it does not run here.
const Isa& isa();
bool select_isa(const char* name);

// A matrix (rows, columns) of any dtype, columns contiguous.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t ld;  // elements from one row to the next
  int64_t rows, columns;

  const void* at(int64_t row, int64_t column) const {
    return static_cast<const char*>(data) + (row * ld + column) * item_size(dtype);
  }
};

// A chunk's logits: (v, width) of the student and of the teacher, each with row stride `ld`; width a multiple of 16.
struct Chunk {
  float* s;
  float* t;
  int64_t ld_s, ld_t;
  int64_t v, width;
};

// Every function below splits its work into pieces that do not depend on `threads`, so neither does its result.

// out (v, n) = head (v, k) @ x (n, k)^T
void project(const Matrix& head, const float* x, int64_t ld_x, int64_t n, float* out, int64_t ld_out, int threads);
// out (l, d) = g (v, l)^T @ head (v, d)
void backproject(const float* g, int64_t ld_g, int64_t l, const Matrix& head, float* out, int threads);
// out (v, d) += g (v, l) @ hidden (l, d)
void accumulate_head(const float* g, int64_t ld_g, int64_t v, int64_t l, const float* hidden, int64_t d, float* out,
                     int threads);

// out (6, width): the fields of ColumnStatistics.
void chunk_statistics(const Chunk& chunk, const Transforms& f, double* out, int threads);
// out (2, width): divergence and S.
void chunk_measure(const Chunk& chunk, const Transforms& f, const Options& o, const Normalised& normalised, double* out,
                   int threads);
// Writes the gradient of column live[j] over column j of the student's logits, for j < n_live, and 0 up to `padded`.
void chunk_gradient(const Chunk& chunk, const Transforms& f, const Options& o, const Normalised& normalised,
                    const int32_t* live, int64_t n_live, int64_t padded, int threads);

// Rows of logits that exist: row r of `n` is student row student_row[r] against teacher row teacher_row[r], over the
// first v columns. out (n, RowOutput::kColumns).
void rows_forward(const Matrix& student, const Matrix& teacher, const int64_t* student_row, const int64_t* teacher_row,
                  const int32_t* kind, int64_t n, int64_t v, const Transforms& f, const Options& o, double* out,
                  int threads);
// Gradient of each row times scale[r] to row student_row[r] of `out`, columns past v set to 0; added to what is there
// if `add`. state (n, ld_state): the columns of Known.
void rows_backward(const Matrix& student, const Matrix& teacher, const int64_t* student_row, const int64_t* teacher_row,
                   const int32_t* kind, const float* state, int64_t ld_state, const float* scale, int64_t n, int64_t v,
                   const Transforms& f, const Options& o, const Matrix& out, bool add, int threads);

}  // namespace vigos::cpu
