// The fused projections on Hopper as the host sees them. No CUDA header is needed here.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace vigos {

// R = rows, V = vocab. bf16 matrices, row-major; strides in elements.
struct LinearHopperParams {
  const void* student_hidden = nullptr;  // (R, d)
  const void* teacher_hidden = nullptr;  // (R, d_t)
  const void* student_weight = nullptr;  // (V, d)
  const void* teacher_weight = nullptr;  // (V, d_t); null: the student's, read once for both (d_t = d)
  int64_t stride_student_hidden = 0, stride_teacher_hidden = 0, stride_student_weight = 0, stride_teacher_weight = 0;
  int64_t d = 0, d_t = 0;
  int64_t rows = 0, vocab = 0, logical_vocab = 0;
  float alpha = 1.0f;            // logit_scale / temperature
  const int8_t* kind = nullptr;  // (R,); forward or reverse KL

  // Statistics.
  int splits = 1;                    // parts of the vocabulary, each a block's; from linear_hopper_plan
  float* partial = nullptr;          // (kRunningFields, splits, R)
  const int64_t* labels = nullptr;   // (R,) or null
  float* label_logits = nullptr;     // (2, R) z_s and z_t of the labels; with labels
  const float* clip = nullptr;       // (R,) nats
  float* divergence = nullptr;       // (R,)
  uint8_t* clipped = nullptr;        // (R,)
  float* student_entropy = nullptr;  // (R,)
  float* teacher_entropy = nullptr;  // (R,)
  float* student_lse = nullptr;      // (R,)
  float* teacher_lse = nullptr;      // (R,)
  float* student_logprob = nullptr;  // (R,)
  float* teacher_logprob = nullptr;  // (R,)

  // Statistics write it, the gradient reads it.
  float* state = nullptr;  // (R, State::kColumns)

  // Gradient.
  const float* live = nullptr;  // (R,) 1, or 0 for a row whose dlogits are 0
  void* dlogits = nullptr;      // (R, V) bf16, d divergence / d raw student logits
  int64_t stride_dlogits = 0;
};

constexpr int kRunningFields = 9;  // of RowStats

struct LinearHopperPlan {
  int64_t row_tiles;
  int splits;
};

LinearHopperPlan linear_hopper_plan(int64_t rows, int64_t vocab, int multiprocessors);
// Throw std::invalid_argument or std::runtime_error, as logits_rows does.
void linear_statistics(const LinearHopperParams& params, void* stream);
void linear_gradient(const LinearHopperParams& params, void* stream);

}  // namespace vigos
