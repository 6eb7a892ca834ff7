// The CPU row kernels and the matrix products around them: what bindings and the per-instruction-set sources share.
//
// Logits of a chunk lie as (V, columns): one supervised row is a column, and SIMD lanes are neighbouring columns. Rows
// of logits that a caller brings, (N, V), are walked as 16 interleaved columns of the same row.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace vigos::cpu {

constexpr int64_t kGradientRows = 16;
constexpr int64_t kDepth = 256;  // of a product in one piece: a panel of it stays in the first-level cache

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

// Rows of (Sums::kRows, columns) doubles, sums over part of the vocabulary: max z; sum exp(z - max); sum exp(z - max)
// (z - max).
struct Sums {
  enum : int { kTopS, kTopT, kTotalS, kTotalT, kFirstS, kFirstT, kRows };
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

// The gradient of a chunk's student logits, as measure leaves it: entry v of column live[j] is a - p_s S.
struct Slopes {
  const float* a;
  const float* p_s;
  int64_t ld;               // floats from one entry to the next
  int64_t width;            // columns, a multiple of 16
  const float* mean_slope;  // S, (width,)
  const int32_t* live;      // (n,), ascending
  int64_t n;
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

  // First visit: adds a view to the running sums of its columns, (Sums::kRows, lanes).
  void (*statistics)(const View&, const Transforms&, double* sums);
  // Second visit: value[c] += the divergence's terms, gradient[c] += the terms of S. a and p_s, both times dz_s / d
  // raw_s, are written to `a` and `p_s`, or not if these are null; they lie as the view's s and t do, and may be those.
  void (*measure)(const View&, const Transforms&, const Options&, const Normalised&, double* value, double* gradient,
                  float* a, float* p_s);
  // The same entries' gradient, a - p_s S, from logits that stay: (steps, lanes) to out (row stride ld_out), times
  // scale[c].
  void (*gradient)(const View&, const Transforms&, const Options&, const Normalised&, const float* scale, float* out,
                   int64_t ld_out);
  // Rows of any dtype to and from float32.
  void (*widen)(const void* from, Dtype dtype, int64_t n, float* dest);
  void (*narrow)(const float* from, int64_t n, void* dest, Dtype dtype);
  // Columns of the right operand, B(k, j) = x[j * ld + k], into panels.
  void (*pack_rows)(const float* x, int64_t ld, int64_t k, int64_t n, float* dest);
  // Rows of it, B(k, j) = x[k * ld + j] of any dtype, into panels.
  void (*pack_columns)(const void* x, Dtype dtype, int64_t ld, int64_t k, int64_t n, float* dest);
  // The gradient of a vocabulary entry v, live columns only: n floats.
  void (*gradient_row)(const Slopes&, int64_t v, float* dest);
  // The gradient of entries from v on as columns of the left operand, A(i, k) = gradient(v + k, i), in tiles; room for
  // n + rows - 1 rows. rows: kGradientRows * width floats to work in.
  void (*pack_tiles)(const Slopes&, int64_t v, int64_t k, float* rows, float* dest);
  // c (m, n) = or += A (m, k) @ packed panels over a depth k in one piece, A(i, k) = a[i * ld + k] or, with ld 0, in
  // tiles; what comes next is fetched meanwhile.
  void (*multiply)(const float* a, int64_t ld, const float* packed, int64_t m, int64_t n, int64_t k, float* c,
                   int64_t ld_c, bool add, const Prefetch& next);
  // The operations of n rounds of multiplications and additions in registers, on 0 < x < 1: to measure the peak with.
  int64_t (*multiply_add)(int64_t n, float x);
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
// `start`: index into the biases of the first.
struct Chunk {
  float* s;
  float* t;
  int64_t ld_s, ld_t;
  int64_t v, width, start;
};

// Every function below splits its work into pieces that do not depend on `threads`, so neither does its result.

// Logits of a chunk that are complete with a product: their sums are taken while they are in the second-level cache,
// and merged into `sums`, (Sums::kRows, width).
struct Statistics {
  const Chunk& chunk;
  const Transforms& f;
  double* sums;
};

// out (v, n) = head (v, k) @ x (n, k)^T
void project(const Matrix& head, const float* x, int64_t ld_x, int64_t n, float* out, int64_t ld_out,
             const Statistics* statistics, int threads);
// out (l, d) = g^T @ head (v, d)
void backproject(const Slopes& g, const Matrix& head, float* out, int threads);
// out (v, d) += g (v, l) @ hidden (l, d); bias (v,), or null, += g @ weight (l,)
void accumulate_head(const Slopes& g, int64_t v, const float* hidden, int64_t d, const float* weight, float* out,
                     float* bias, int threads);
// The same sums of logits that were changed after their product.
void chunk_statistics(const Statistics& statistics, int threads);
// out (2, width): divergence and S. Where `write`, the chunk holds Slopes afterwards.
void chunk_measure(const Chunk& chunk, const Transforms& f, const Options& o, const Normalised& normalised, bool write,
                   double* out, int threads);

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
