// Tensor maps and launch of the product. wgmma exists for sm_90a alone: code for other architectures is empty and
// refused before a launch.
#include <cuda_runtime.h>

#include "linear_hopper_host.h"

namespace vigos {
namespace {

template <bool SHARED_HEAD, bool BFLOAT>
__global__ void __launch_bounds__(kHopperThreads, 1)
    pair_product_kernel(const __grid_constant__ PairProductParams params, const __grid_constant__ HopperMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  pair_product_body<SHARED_HEAD, BFLOAT>(params, maps);
#endif
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

// 16-bit (rows, columns), of either float: they are only copied. Boxes of kTileM rows (= kTileN) by kTileK columns,
// 128-byte swizzle, zeros outside.
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

template <bool SHARED_HEAD, bool BFLOAT>
void launch(PairProductParams p, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  if (major != 9 || minor != 0) {
    throw std::runtime_error("pair_product needs compute capability 9.0, this GPU has " + std::to_string(major) + "." +
                             std::to_string(minor));
  }
  HopperMaps maps;
  maps.student_hidden = tensor_map("student_hidden", p.student_hidden, p.rows, p.d, p.stride_student_hidden);
  maps.teacher_hidden = tensor_map("teacher_hidden", p.teacher_hidden, p.rows, p.d_t, p.stride_teacher_hidden);
  maps.student_weight = tensor_map("student_weight", p.student_weight, p.vocab, p.d, p.stride_student_weight);
  maps.teacher_weight = SHARED_HEAD
                            ? maps.student_weight
                            : tensor_map("teacher_weight", p.teacher_weight, p.vocab, p.d_t, p.stride_teacher_weight);
  const auto kernel = pair_product_kernel<SHARED_HEAD, BFLOAT>;
  constexpr int kBytes = HopperShared<SHARED_HEAD>::kBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "shared memory");
  p.clusters = product_clusters(p, multiprocessors);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kClusterTiles, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.clusters * kClusterTiles));
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, p, maps), "launch of pair_product");
}

}  // namespace

void pair_product(const PairProductParams& p, Dtype dtype, void* stream) {
  check_pair_product(p, dtype);
  if (p.rows == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::kBFloat16) {
    p.teacher_weight ? launch<false, true>(p, on) : launch<true, true>(p, on);
  } else {
    p.teacher_weight ? launch<false, false>(p, on) : launch<true, false>(p, on);
  }
}

}  // namespace vigos
