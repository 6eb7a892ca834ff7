// What the launcher of the product does before a launch: checks and the number of clusters. Host code without CUDA.
#pragma once

#include <string>

#include "checks.h"
#include "linear_hopper.cuh"

namespace vigos {

inline void check_matrix(const char* name, const void* pointer, int64_t columns, int64_t stride) {
  require_pointer(name, pointer);
  require_aligned(name, pointer, 16);
  require(columns > 0 && columns % 8 == 0, name, "of a width that is a multiple of 8 (16 bytes)", columns);
  require(stride >= columns && stride % 8 == 0, name, "of a row stride that is a multiple of 8, at least its width",
          stride);
}

inline void check_pair_product(const PairProductParams& p, Dtype dtype) {
  require(dtype != Dtype::kFloat32, "dtype", "float16 or bfloat16", "float32");
  require(p.rows >= 0 && p.rows <= INT32_MAX - kTileM, "rows", "in [0, 2**31 - 128)", p.rows);
  require(p.vocab > 0 && p.vocab <= INT32_MAX - 2 * kTileN, "vocab", "in [1, 2**31 - 256)", p.vocab);
  require(p.logical_vocab > 0 && p.logical_vocab <= p.vocab, "logical_vocab", "in [1, " + std::to_string(p.vocab) + "]",
          p.logical_vocab);
  require(cluster_tiles(p) <= INT32_MAX, "rows", "fewer: tiles of 128 x 256 must stay below 2**31", p.rows);
  require(p.teacher_weight != nullptr || p.d == p.d_t, "d_t", "d where the head is shared", p.d_t);
  if (p.rows == 0) return;
  check_matrix("student_hidden", p.student_hidden, p.d, p.stride_student_hidden);
  check_matrix("teacher_hidden", p.teacher_hidden, p.d_t, p.stride_teacher_hidden);
  check_matrix("student_weight", p.student_weight, p.d, p.stride_student_weight);
  if (p.teacher_weight) check_matrix("teacher_weight", p.teacher_weight, p.d_t, p.stride_teacher_weight);
  require_pointer("pairs", p.pairs);
  require_pointer("tops", p.tops);
  require_aligned("pairs", p.pairs, 16);
  const int64_t tiles = vocab_tiles(p);
  require(p.stride_pairs >= tiles * kTileN && p.stride_pairs % 4 == 0, "stride_pairs",
          "a multiple of 4, at least vocab rounded up to 128", p.stride_pairs);
  require(p.stride_tops >= tiles, "stride_tops", "at least vocab / 128", p.stride_tops);
}

// Two blocks a cluster, a block a multiprocessor; no more than there is work for.
inline int64_t product_clusters(const PairProductParams& p, int multiprocessors) {
  const int64_t most = multiprocessors > kClusterTiles ? multiprocessors / kClusterTiles : 1, work = cluster_tiles(p);
  return work < most ? work : most;
}

}  // namespace vigos
