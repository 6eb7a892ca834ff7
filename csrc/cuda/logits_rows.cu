// Launch of the logits row kernels: device properties, then the pair of dtypes.
#include "logits_rows_host.h"
#include "logits_rows_launch.cuh"

namespace vigos {

LogitsRowsPlan logits_rows_plan(int64_t vocab, Dtype dtype, int compute_capability, int64_t shared_limit) {
  return plan_rows(vocab, dtype, compute_capability, shared_limit);
}

namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace

bool logits_rows_stay(int64_t vocab, Dtype dtype) {
  return plan_rows(vocab, dtype, compute_capability(), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                   kPortableCluster)
      .resident;
}

void logits_rows(const LogitsRowsParams& params, Dtype logits, Dtype gradient, const char* path, void* stream) {
  check_rows(params, logits, gradient, path);
  if (params.rows == 0) return;
  const int capability = compute_capability(), limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  LogitsRowsParams p = params;
  p.alike = p.student_transform == p.teacher_transform;
  const bool aligned = vectors_fit(p, logits, gradient);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto launch = [&](int most) {
    const LogitsRowsPlan plan = chosen_plan(params, logits, path, aligned, capability, limit, most);
    if (logits == Dtype::kStoredPair) {
      return gradient == Dtype::kBFloat16 ? dispatch_pairs<__nv_bfloat16>(p, plan, cuda_stream)
                                          : dispatch_pairs<__half>(p, plan, cuda_stream);
    }
    if (logits == Dtype::kBFloat16) return dispatch_rows<__nv_bfloat16, __nv_bfloat16>(p, plan, aligned, cuda_stream);
    if (logits == Dtype::kFloat16) return dispatch_rows<__half, __half>(p, plan, aligned, cuda_stream);
    if (gradient == Dtype::kBFloat16) return dispatch_rows<float, __nv_bfloat16>(p, plan, aligned, cuda_stream);
    if (gradient == Dtype::kFloat16) return dispatch_rows<float, __half>(p, plan, aligned, cuda_stream);
    return dispatch_rows<float, float>(p, plan, aligned, cuda_stream);
  };
  cudaError_t error = launch(kMaxCluster);
  if (error == cudaErrorInvalidClusterSize) error = launch(kPortableCluster);
  check_cuda(error, "launch of logits_rows");
}

void logits_gradient(const LogitsGradientParams& params, Dtype logits, void* stream) {
  check_gradient(params, logits);
  if (params.rows == 0) return;
  LogitsGradientParams p = params;
  p.alike = p.student_transform == p.teacher_transform;
  const bool aligned = vectors_fit(p, logits, logits);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = logits == Dtype::kFloat32    ? dispatch_gradient<float>(p, aligned, cuda_stream)
                            : logits == Dtype::kBFloat16 ? dispatch_gradient<__nv_bfloat16>(p, aligned, cuda_stream)
                                                         : dispatch_gradient<__half>(p, aligned, cuda_stream);
  check_cuda(error, "launch of logits_gradient");
}

}  // namespace vigos
