// The product that leaves logits as pairs of 16-bit numbers, as the host sees it. No CUDA header is needed here.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace vigos {

constexpr int kTileM = 128, kTileN = 128;  // of the result: rows, vocabulary entries

// R = rows, V = vocab, tiles = ceil(V / kTileN). Matrices of one 16-bit dtype, row-major; strides in elements.
struct PairProductParams {
  const void* student_hidden = nullptr;  // (R, d)
  const void* teacher_hidden = nullptr;  // (R, d_t)
  const void* student_weight = nullptr;  // (V, d)
  const void* teacher_weight = nullptr;  // (V, d_t); null: the student's, read once for both (d_t = d)
  void* pairs = nullptr;                 // (R, tiles * kTileN) StoredPair; columns from logical_vocab on mean nothing
  float* tops = nullptr;                 // (R, tiles)
  int64_t stride_student_hidden = 0, stride_teacher_hidden = 0, stride_student_weight = 0, stride_teacher_weight = 0;
  int64_t stride_pairs = 0, stride_tops = 0;
  int64_t d = 0, d_t = 0;
  int64_t rows = 0, vocab = 0, logical_vocab = 0;
  int64_t clusters = 0;  // of two blocks; set by the launcher
};

// Dtype: of the operands. Throws std::invalid_argument or std::runtime_error, as logits_rows does.
void pair_product(const PairProductParams& params, Dtype dtype, void* stream);

}  // namespace vigos
