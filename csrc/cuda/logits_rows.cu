// Checks, plan and dispatch of the logits row kernel.
#include <stdexcept>
#include <string>

#include "checks.h"
#include "logits_rows_launch.cuh"

namespace vigos {
namespace {

void check_rows(const LogitsRowsParams& p, Dtype logits, Dtype gradient) {
  require(p.vocab > 0, "vocab", "> 0", p.vocab);
  require(p.rows >= 0, "rows", ">= 0", p.rows);
  require(p.logical_vocab > 0 && p.logical_vocab <= p.vocab, "logical_vocab", "in [1, " + std::to_string(p.vocab) + "]",
          p.logical_vocab);
  require(p.rows <= INT32_MAX / kMaxCluster, "rows", "at most 2**31 / 8 a launch", p.rows);
  require(p.vocab <= INT32_MAX, "vocab", "below 2**31", p.vocab);
  require(p.stride_student >= p.vocab, "stride_student", "at least vocab", p.stride_student);
  require(p.stride_teacher >= p.vocab, "stride_teacher", "at least vocab", p.stride_teacher);
  require_aligned("student", p.student, item_size(logits));
  require_aligned("teacher", p.teacher, item_size(logits));
  require_aligned("dlogits", p.dlogits, item_size(gradient));
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
    require(p.dlogits != p.student || (logits == gradient && p.stride_dlogits == p.stride_student), "dlogits",
            "another buffer than student where dtype or stride differ", p.stride_dlogits);
    require(p.dlogits != p.student || p.student_row == nullptr || p.dlogits_by_student_row, "dlogits_by_student_row",
            "true where the gradient goes in place of gathered rows", 0);
  }
}

void check_gradient(const LogitsGradientParams& p, Dtype logits) {
  require(p.vocab > 0 && p.vocab <= INT32_MAX, "vocab", "in [1, 2**31)", p.vocab);
  require(p.rows >= 0, "rows", ">= 0", p.rows);
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

// The kernels read z = x * scale where there is no softcap: the temperature goes in with it.
Transform folded(Transform t) {
  if (!(t.softcap > 0.0f)) {
    t.scale *= t.inv_temperature;
    t.inv_temperature = 1.0f;
  }
  return t;
}

// 16-byte loads of both sides, and stores of as many gradients.
template <typename P>
bool vectors_fit(const P& p, Dtype logits, Dtype gradient) {
  const int64_t count = kVectorBytes / item_size(logits);
  return aligned_to(p.student, kVectorBytes) && aligned_to(p.teacher, kVectorBytes) &&
         aligned_to(p.dlogits, count * item_size(gradient)) && p.stride_student % count == 0 &&
         p.stride_teacher % count == 0 && (!p.dlogits || p.stride_dlogits % count == 0);
}

}  // namespace

LogitsRowsPlan logits_rows_plan(int64_t vocab, Dtype dtype, int compute_capability, int64_t shared_limit) {
  require(vocab > 0, "vocab", "> 0", vocab);
  const LogitsRowsPlan two_pass{false, 1, sizeof(RowShared)};
  if (compute_capability < 90) return two_pass;
  // The smallest cluster that leaves room for two blocks a multiprocessor; else the largest, if a row fits at all.
  for (const int64_t budget : {shared_limit / 2 - 1024, shared_limit}) {
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      const int64_t per_vector = kVectorBytes / item_size(dtype);
      const int64_t vectors = (vocab + per_vector - 1) / per_vector;
      const int64_t bytes = sizeof(RowShared) + 2 * kVectorBytes * ((vectors + cluster - 1) / cluster);
      if (bytes <= budget) return {true, cluster, bytes};
    }
  }
  return two_pass;
}

void logits_rows(const LogitsRowsParams& params, Dtype logits, Dtype gradient, const char* path, void* stream) {
  check_rows(params, logits, gradient);
  const std::string wanted = path;
  require(wanted == "auto" || wanted == "resident" || wanted == "two_pass", "path", "auto, resident or two_pass", path);
  const bool pair = logits == Dtype::kFloat32 || logits == gradient;
  require(pair, "gradient dtype", "the logits' dtype; any for float32 logits", static_cast<int64_t>(gradient));
  if (params.rows == 0) return;

  int device = 0, major = 0, minor = 0, limit = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  LogitsRowsPlan plan = logits_rows_plan(params.vocab, logits, 10 * major + minor, limit);
  if (wanted == "resident") require(plan.resident, "path", "two_pass: a row does not fit in shared memory here", path);
  if (wanted == "two_pass") plan = {false, 1, sizeof(RowShared)};

  LogitsRowsParams p = params;
  p.transform = folded(p.transform);
  const bool aligned = vectors_fit(p, logits, gradient);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaErrorInvalidValue;
  if (logits == Dtype::kBFloat16) {
    error = dispatch_rows<__nv_bfloat16, __nv_bfloat16>(p, plan, aligned, cuda_stream);
  } else if (logits == Dtype::kFloat16) {
    error = dispatch_rows<__half, __half>(p, plan, aligned, cuda_stream);
  } else if (gradient == Dtype::kBFloat16) {
    error = dispatch_rows<float, __nv_bfloat16>(p, plan, aligned, cuda_stream);
  } else if (gradient == Dtype::kFloat16) {
    error = dispatch_rows<float, __half>(p, plan, aligned, cuda_stream);
  } else {
    error = dispatch_rows<float, float>(p, plan, aligned, cuda_stream);
  }
  check_cuda(error, "launch of logits_rows");
}

void logits_gradient(const LogitsGradientParams& params, Dtype logits, void* stream) {
  check_gradient(params, logits);
  if (params.rows == 0) return;
  LogitsGradientParams p = params;
  p.transform = folded(p.transform);
  const bool aligned = vectors_fit(p, logits, logits);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = logits == Dtype::kFloat32    ? dispatch_gradient<float>(p, aligned, cuda_stream)
                            : logits == Dtype::kBFloat16 ? dispatch_gradient<__nv_bfloat16>(p, aligned, cuda_stream)
                                                         : dispatch_gradient<__half>(p, aligned, cuda_stream);
  check_cuda(error, "launch of logits_gradient");
}

}  // namespace vigos
