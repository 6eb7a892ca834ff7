// What the launchers of the fused projections do before a launch: checks and the plan. Host code without CUDA.
#pragma once

#include <string>

#include "checks.h"
#include "linear_hopper.cuh"

namespace vigos {

inline LinearHopperPlan plan_linear(int64_t rows, int64_t vocab, int multiprocessors) {
  require(rows > 0, "rows", "> 0", rows);
  require(vocab > 0, "vocab", "> 0", vocab);
  require(multiprocessors > 0, "multiprocessors", "> 0", multiprocessors);
  const int64_t row_tiles = (rows + kTileM - 1) / kTileM, tiles = (vocab + kTileN - 1) / kTileN;
  // As many parts as make the waves of blocks shortest, where a block's start and end cost about two tiles.
  int best = 1;
  int64_t shortest = INT64_MAX;
  for (int splits = 1; splits <= multiprocessors && splits <= tiles; ++splits) {
    const int64_t waves = (row_tiles * splits + multiprocessors - 1) / multiprocessors;
    const int64_t length = waves * ((tiles + splits - 1) / splits + 2);
    if (length < shortest) {
      shortest = length;
      best = splits;
    }
  }
  // No part may be empty: its statistics would be those of no entry, and its block would wait for nothing.
  const int64_t each = (tiles + best - 1) / best;
  return {row_tiles, static_cast<int>((tiles + each - 1) / each)};
}

inline void check_matrix(const char* name, const void* pointer, int64_t columns, int64_t stride) {
  require_pointer(name, pointer);
  require_aligned(name, pointer, 16);
  require(columns > 0 && columns % 8 == 0, name, "of a width that is a multiple of 8 (16 bytes)", columns);
  require(stride >= columns && stride % 8 == 0, name, "of a row stride that is a multiple of 8, at least its width",
          stride);
}

inline void check_linear(const LinearHopperParams& p) {
  require(p.rows >= 0 && p.rows <= INT32_MAX - kTileM, "rows", "in [0, 2**31 - 128)", p.rows);
  require(p.vocab > 0 && p.vocab <= INT32_MAX - kTileN, "vocab", "in [1, 2**31 - 128)", p.vocab);
  require(p.logical_vocab > 0 && p.logical_vocab <= p.vocab, "logical_vocab", "in [1, " + std::to_string(p.vocab) + "]",
          p.logical_vocab);
  require(p.teacher_weight != nullptr || p.d == p.d_t, "d_t", "d where the head is shared", p.d_t);
  require(p.splits > 0, "splits", "> 0", p.splits);
  const int64_t tiles = (p.vocab + kTileN - 1) / kTileN, each = (tiles + p.splits - 1) / p.splits;
  require(each * (p.splits - 1) < tiles, "splits", "few enough that each holds a tile of the vocabulary", p.splits);
  if (p.rows == 0) return;
  check_matrix("student_hidden", p.student_hidden, p.d, p.stride_student_hidden);
  check_matrix("teacher_hidden", p.teacher_hidden, p.d_t, p.stride_teacher_hidden);
  check_matrix("student_weight", p.student_weight, p.d, p.stride_student_weight);
  if (p.teacher_weight) check_matrix("teacher_weight", p.teacher_weight, p.d_t, p.stride_teacher_weight);
  require_pointer("kind", p.kind);
  require_pointer("state", p.state);
}

inline void check_statistics(const LinearHopperParams& p) {
  check_linear(p);
  if (p.rows == 0) return;
  require_pointer("partial", p.partial);
  require_pointer("clip", p.clip);
  require_pointer("divergence", p.divergence);
  require_pointer("clipped", p.clipped);
  require_pointer("student_entropy", p.student_entropy);
  require_pointer("teacher_entropy", p.teacher_entropy);
  require_pointer("student_lse", p.student_lse);
  require_pointer("teacher_lse", p.teacher_lse);
  if (p.labels) {
    require_pointer("label_logits", p.label_logits);
    require_pointer("student_logprob", p.student_logprob);
    require_pointer("teacher_logprob", p.teacher_logprob);
  }
}

inline void check_linear_gradient(const LinearHopperParams& p) {
  check_linear(p);
  if (p.rows == 0) return;
  require_pointer("live", p.live);
  require_pointer("dlogits", p.dlogits);
  require_aligned("dlogits", p.dlogits, 4);
  require(p.stride_dlogits >= p.vocab && p.stride_dlogits % 2 == 0, "stride_dlogits", "even and at least vocab",
          p.stride_dlogits);
}

}  // namespace vigos
