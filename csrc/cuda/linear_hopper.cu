// Tensor maps and launches of the fused projections. wgmma exists for sm_90a alone: code for other architectures is
// empty and refused before a launch.
#include <cuda_runtime.h>

#include "linear_hopper_host.h"

namespace vigos {
namespace {

template <bool SHARED_HEAD, HopperMode MODE>
__global__ void __launch_bounds__(kHopperThreads, 1)
    linear_hopper_kernel(const __grid_constant__ LinearHopperParams params, const __grid_constant__ HopperMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  linear_hopper_body<SHARED_HEAD, MODE>(params, maps);
#endif
}

constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads) linear_merge_kernel(const __grid_constant__ LinearHopperParams p) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (r < p.rows) linear_merge_body(p, r);
}

// The driver's encoder, found through the runtime: the extension does not link to libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
             "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("cuTensorMapEncodeTiled: this driver has none; CUDA 12.0 or newer is needed");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// bf16 (rows, columns); boxes of kTileM rows (= kTileN) by kTileK columns, 128-byte swizzle, zeros outside.
CUtensorMap tensor_map(const char* name, const void* pointer, int64_t rows, int64_t columns, int64_t stride) {
  static_assert(kTileM == kTileN && kTileK * 2 == 128);
  static const auto encode = encoder();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kTileK, kTileM}, steps[2] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(pointer), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("tensor map of ") + name + ": driver error " + std::to_string(result));
  }
  return map;
}

template <bool SHARED_HEAD, HopperMode MODE>
void launch(const LinearHopperParams& p, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  if (major != 9 || minor != 0) {
    throw std::runtime_error("the fused projections need compute capability 9.0, this GPU has " +
                             std::to_string(major) + "." + std::to_string(minor));
  }
  HopperMaps maps;
  maps.student_hidden = tensor_map("student_hidden", p.student_hidden, p.rows, p.d, p.stride_student_hidden);
  maps.teacher_hidden = tensor_map("teacher_hidden", p.teacher_hidden, p.rows, p.d_t, p.stride_teacher_hidden);
  maps.student_weight = tensor_map("student_weight", p.student_weight, p.vocab, p.d, p.stride_student_weight);
  maps.teacher_weight = SHARED_HEAD
                            ? maps.student_weight
                            : tensor_map("teacher_weight", p.teacher_weight, p.vocab, p.d_t, p.stride_teacher_weight);
  const auto kernel = linear_hopper_kernel<SHARED_HEAD, MODE>;
  constexpr int kBytes = HopperShared<SHARED_HEAD>::kBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "shared memory");
  const int64_t row_tiles = (p.rows + kTileM - 1) / kTileM;
  kernel<<<static_cast<unsigned>(row_tiles * p.splits), kHopperThreads, kBytes, stream>>>(p, maps);
  check_cuda(cudaGetLastError(), "launch of linear_hopper");
}

}  // namespace

LinearHopperPlan linear_hopper_plan(int64_t rows, int64_t vocab, int multiprocessors) {
  return plan_linear(rows, vocab, multiprocessors);
}

void linear_statistics(const LinearHopperParams& p, void* stream) {
  check_statistics(p);
  if (p.rows == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  p.teacher_weight ? launch<false, HopperMode::kStatistics>(p, on) : launch<true, HopperMode::kStatistics>(p, on);
  linear_merge_kernel<<<static_cast<unsigned>((p.rows + kMergeThreads - 1) / kMergeThreads), kMergeThreads, 0, on>>>(p);
  check_cuda(cudaGetLastError(), "launch of linear_merge");
}

void linear_gradient(const LinearHopperParams& p, void* stream) {
  check_linear_gradient(p);
  if (p.rows == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  p.teacher_weight ? launch<false, HopperMode::kGradient>(p, on) : launch<true, HopperMode::kGradient>(p, on);
}

}  // namespace vigos
