// What the launchers do before a launch: checks, the plan, the choice of a path. Host code without CUDA, so that the
// tests' emulation goes through it too.
#pragma once

#include <string>

#include "checks.h"
#include "logits_rows.cuh"

namespace vigos {

inline void check_transform(const Transform& f, const char* name) {
  require(f.alpha > 0.0f, name, "a transform with alpha > 0", std::to_string(f.alpha));
}

// Whether rows need the general code: biases, a softcap, or sides that differ.
template <typename P>
bool transforms_fully(const P& p) {
  return p.student_bias || p.teacher_bias || p.student_transform.inner > 0.0f ||
         !(p.student_transform == p.teacher_transform);
}

// 16-byte loads of both sides, and stores of as many gradients.
template <typename P>
bool vectors_fit(const P& p, Dtype logits, Dtype gradient) {
  const int64_t count = kVectorBytes / item_size(logits);
  const bool teacher = aligned_to(p.teacher, kVectorBytes) && p.stride_teacher % count == 0;
  return aligned_to(p.student, kVectorBytes) && aligned_to(p.dlogits, count * item_size(gradient)) &&
         p.stride_student % count == 0 && (!p.dlogits || p.stride_dlogits % count == 0) &&
         (teacher || logits == Dtype::kStoredPair);
}

inline void check_rows(const LogitsRowsParams& p, Dtype logits, Dtype gradient, const std::string& path) {
  require(path == "auto" || path == "resident" || path == "two_pass", "path", "auto, resident or two_pass", path);
  const bool pairs = logits == Dtype::kStoredPair;
  require(gradient != Dtype::kStoredPair && (!pairs || gradient != Dtype::kFloat32) &&
              (pairs || logits == Dtype::kFloat32 || logits == gradient),
          "gradient_dtype", "the logits' dtype, any for float32, of 16 bits for stored pairs",
          static_cast<int64_t>(gradient));
  require(p.vocab > 0, "vocab", "> 0", p.vocab);
  require(p.rows >= 0, "rows", ">= 0", p.rows);
  check_transform(p.student_transform, "student_transform");
  check_transform(p.teacher_transform, "teacher_transform");
  require(p.logical_vocab > 0 && p.logical_vocab <= p.vocab, "logical_vocab", "in [1, " + std::to_string(p.vocab) + "]",
          p.logical_vocab);
  require(p.rows <= INT32_MAX / kMaxCluster, "rows", "at most 2**31 / 16 a launch", p.rows);
  require(p.vocab <= INT32_MAX, "vocab", "below 2**31", p.vocab);
  require(p.stride_student >= p.vocab, "stride_student", "at least vocab", p.stride_student);
  require(p.stride_teacher >= (pairs ? (p.vocab + kTileN - 1) / kTileN : p.vocab), "stride_teacher",
          pairs ? "at least vocab / 128" : "at least vocab", p.stride_teacher);
  require_aligned("student", p.student, item_size(logits));
  require_aligned("teacher", p.teacher, item_size(logits));
  require_aligned("dlogits", p.dlogits, item_size(gradient));
  if (pairs) {
    require(vectors_fit(p, logits, gradient), "student",
            "stored pairs, and dlogits rows, on whole vectors of 4 entries", "others");
    require(!transforms_fully(p), "student_transform", "the teacher's, without bias or softcap, for stored pairs",
            "another");
  }
  if (p.rows == 0) return;
  require_pointer("student", p.student);
  require_pointer("teacher", p.teacher);
  require_pointer("kind", p.kind);
  require_pointer("weight", p.weight);
  require_pointer("clip", p.clip);
  require_pointer("divergence", p.divergence);
  require_pointer("clipped", p.clipped);
  require_pointer("student_entropy", p.student_entropy);
  require_pointer("teacher_entropy", p.teacher_entropy);
  require_pointer("student_lse", p.student_lse);
  require_pointer("teacher_lse", p.teacher_lse);
  if (p.labels) {
    require_pointer("student_logprob", p.student_logprob);
    require_pointer("teacher_logprob", p.teacher_logprob);
  }
  if (p.dlogits) {
    require(p.stride_dlogits >= p.vocab, "stride_dlogits", "at least vocab", p.stride_dlogits);
    require(p.dlogits != p.student || p.stride_dlogits * item_size(gradient) == p.stride_student * item_size(logits),
            "dlogits", "another buffer than student where rows do not keep their places", p.stride_dlogits);
    require(p.dlogits != p.student || (p.student_row == nullptr && p.dlogits_row == nullptr), "dlogits",
            "another buffer than student for gathered rows", "the same");
  }
}

inline void check_gradient(const LogitsGradientParams& p, Dtype logits) {
  require(p.vocab > 0 && p.vocab <= INT32_MAX, "vocab", "in [1, 2**31)", p.vocab);
  require(p.rows >= 0, "rows", ">= 0", p.rows);
  check_transform(p.student_transform, "student_transform");
  check_transform(p.teacher_transform, "teacher_transform");
  require(p.logical_vocab > 0 && p.logical_vocab <= p.vocab, "logical_vocab", "in [1, " + std::to_string(p.vocab) + "]",
          p.logical_vocab);
  require(p.stride_student >= p.vocab, "stride_student", "at least vocab", p.stride_student);
  require(p.stride_teacher >= p.vocab, "stride_teacher", "at least vocab", p.stride_teacher);
  require(p.stride_dlogits >= p.vocab, "stride_dlogits", "at least vocab", p.stride_dlogits);
  require(p.rows <= INT32_MAX / ((p.vocab + kGradientVectors - 1) / kGradientVectors), "rows",
          "fewer: rows times blocks a row must stay below 2**31", p.rows);
  require_aligned("student", p.student, item_size(logits));
  require_aligned("teacher", p.teacher, item_size(logits));
  require_aligned("dlogits", p.dlogits, item_size(logits));
  if (p.rows == 0) return;
  require_pointer("student", p.student);
  require_pointer("teacher", p.teacher);
  require_pointer("dlogits", p.dlogits);
  require_pointer("order", p.order);
  require_pointer("offsets", p.offsets);
  require_pointer("teacher_row", p.teacher_row);
  require_pointer("kind", p.kind);
  require_pointer("row_grad", p.row_grad);
  require_pointer("state", p.state);
  require(p.dlogits != p.student || p.stride_dlogits == p.stride_student, "stride_dlogits",
          "stride_student where the gradient goes in place of the logits", p.stride_dlogits);
}

inline LogitsRowsPlan plan_rows(int64_t vocab, Dtype dtype, int compute_capability, int64_t shared_limit,
                                int most = kMaxCluster) {
  require(vocab > 0, "vocab", "> 0", vocab);
  const LogitsRowsPlan two_pass{false, 1, sizeof(RowShared)};
  if (compute_capability < 90) return two_pass;
  // The smallest cluster that leaves room for two blocks a multiprocessor, so that one computes while the other merges;
  // else the smallest that holds a row, if one does. There is always room for a part of the next row.
  for (const int64_t budget : {shared_limit / 2 - 1024, shared_limit}) {
    for (int cluster = 1; cluster <= most; cluster *= 2) {
      const int64_t per_vector = kVectorBytes / item_size(dtype);
      const int64_t sides = dtype == Dtype::kStoredPair ? 1 : 2;
      const int64_t slice = ((vocab + per_vector - 1) / per_vector + cluster - 1) / cluster;
      // Of stored pairs, whole turns of all threads; elsewhere parts alike, of which more fit.
      const int64_t turn = (sides == 1 ? 2 : 1) * kTileVectors, parts = (slice + turn - 1) / turn;
      const int64_t tile = sides == 1 && parts > 1 ? turn : (slice + parts - 1) / parts;
      const int64_t bytes = sides * kVectorBytes * tile, room = budget - static_cast<int64_t>(sizeof(RowShared));
      const int64_t slots = room / bytes < kMaxSlots ? room / bytes : kMaxSlots;
      if (slots <= parts) continue;
      const auto total = static_cast<int64_t>(sizeof(RowShared)) + slots * bytes;
      return {true, cluster, total, {static_cast<int>(tile), static_cast<int>(slots)}};
    }
  }
  return two_pass;
}

struct GradientGrid {
  int64_t blocks;
  int blocks_per_row;
};

inline GradientGrid gradient_grid(const LogitsGradientParams& p, int64_t entries_per_vector) {
  const int64_t per_block = entries_per_vector * kGradientVectors;
  const int64_t blocks_per_row = (p.vocab + per_block - 1) / per_block;
  return {p.rows * blocks_per_row, static_cast<int>(blocks_per_row)};
}

// The plan after `path`: "auto", "resident" or "two_pass". aligned: rows are whole vectors, which can be copied.
inline LogitsRowsPlan chosen_plan(const LogitsRowsParams& p, Dtype dtype, const std::string& path, bool aligned,
                                  int compute_capability, int64_t shared_limit, int most = kMaxCluster) {
  const LogitsRowsPlan plan = plan_rows(p.vocab, dtype, compute_capability, shared_limit, most);
  const bool resident = plan.resident && aligned && path != "two_pass";
  const bool narrow = p.dlogits == p.student && p.stride_dlogits != p.stride_student;
  require(!narrow || resident, "dlogits", "another buffer than student, whose rows are read again here", path);
  if (path == "resident") require(resident, "path", "two_pass: rows do not fit, or are not on 16 bytes", path);
  return resident ? plan : LogitsRowsPlan{false, 1, sizeof(RowShared)};
}

}  // namespace vigos
