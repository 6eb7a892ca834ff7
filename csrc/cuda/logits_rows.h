// The logits row kernel as the host sees it: one params struct, its plan, its launch. No CUDA header is needed here.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace vigos {

// Device pointers unless said otherwise; strides in elements; R = rows, V = vocab.
struct LogitsRowsParams {
  const void* student = nullptr;  // logits; row i at student + i * stride_student
  const void* teacher = nullptr;  // logits, same dtype
  void* dlogits = nullptr;        // null: no gradient; may be `student` where rows are unique, of which each keeps its
                                  // place; in a smaller dtype only on the resident path
  const int64_t* student_row = nullptr;  // (R,); null: row r
  const int64_t* teacher_row = nullptr;  // (R,); null: row r
  const int64_t* dlogits_row = nullptr;  // (R,); null: row r
  const int8_t* kind = nullptr;          // (R,)
  const float* weight = nullptr;         // (R,); factor of the row's gradient
  const float* clip = nullptr;           // (R,) nats; a row above it has zero gradient
  const float* student_bias = nullptr;   // (V,) or null
  const float* teacher_bias = nullptr;   // (V,) or null
  const int64_t* labels = nullptr;       // (R,) or null; in [0, logical_vocab)

  float* divergence = nullptr;       // (R,) nats, before the clip
  uint8_t* clipped = nullptr;        // (R,)
  float* student_entropy = nullptr;  // (R,) nats
  float* teacher_entropy = nullptr;  // (R,)
  float* student_lse = nullptr;      // (R,) nats
  float* teacher_lse = nullptr;      // (R,)
  float* student_logprob = nullptr;  // (R,); with labels
  float* teacher_logprob = nullptr;  // (R,); with labels
  float* state = nullptr;            // (R, State::kColumns) or null: for a later logits_gradient

  int64_t rows = 0, vocab = 0;
  int64_t logical_vocab = 0;  // entries at and beyond it have probability 0 and gradient 0
  int64_t stride_student = 0, stride_teacher = 0, stride_dlogits = 0;

  Transform student_transform, teacher_transform;
  bool alike = true;   // the transforms are the same; set by the launcher
  float share = 0.5f;  // as Row::share
  float entry_clip = INFINITY;
};

// How a block's part of a row passes through its shared memory.
struct RowLayout {
  int tile = 0;   // vectors a side that are copied at once
  int slots = 0;  // of tiles
};

struct LogitsRowsPlan {
  bool resident;         // the row stays in (distributed) shared memory: one read from device memory
  int cluster;           // blocks of a row
  int64_t shared_bytes;  // dynamic, of a block
  RowLayout layout = {};
};

// How a row of `vocab` entries is laid out on a device with `shared_limit` bytes of shared memory a block.
LogitsRowsPlan logits_rows_plan(int64_t vocab, Dtype dtype, int compute_capability, int64_t shared_limit);

// Whether rows stay in the shared memory of any cluster that the current device takes.
bool logits_rows_stay(int64_t vocab, Dtype dtype);

// Launches on `stream` (a cudaStream_t). Bad arguments: std::invalid_argument; a failed launch: std::runtime_error.
// path: "auto" | "resident" | "two_pass".
void logits_rows(const LogitsRowsParams& params, Dtype logits, Dtype gradient, const char* path, void* stream);

// The gradient alone, from the state that logits_rows left: N = rows of the student's logits. Row n sums over the
// supervised rows order[offsets[n]] ... order[offsets[n + 1] - 1]; without any it is zero.
struct LogitsGradientParams {
  const void* student = nullptr;         // logits (N, V)
  const void* teacher = nullptr;         // logits, same dtype
  void* dlogits = nullptr;               // (N, V), same dtype; may be `student`
  const int64_t* order = nullptr;        // (R,)
  const int64_t* offsets = nullptr;      // (N + 1,)
  const int64_t* teacher_row = nullptr;  // (R,)
  const int8_t* kind = nullptr;          // (R,)
  const float* row_grad = nullptr;       // (R,); 0 leaves a row out
  const float* kept = nullptr;           // (R,) or null: dlogits holds the gradient under these row_grad already
  const float* state = nullptr;          // (R, State::kColumns)
  const float* student_bias = nullptr;   // (V,) or null
  const float* teacher_bias = nullptr;   // (V,) or null
  int64_t rows = 0, vocab = 0, logical_vocab = 0;
  int64_t stride_student = 0, stride_teacher = 0, stride_dlogits = 0;
  Transform student_transform, teacher_transform;
  bool alike = true;   // the transforms are the same; set by the launcher
  float share = 0.5f;  // as Row::share
  float entry_clip = INFINITY;
};

void logits_gradient(const LogitsGradientParams& params, Dtype logits, void* stream);

}  // namespace vigos
