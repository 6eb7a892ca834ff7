// Kernel entry point and launch of one (logits, gradient) pair of dtypes; each pair is instantiated in a file of its
// own so that they compile in parallel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "logits_rows.cuh"
#include "logits_rows_host.h"

namespace vigos {

// Two blocks a multiprocessor where shared memory allows, so that one loads while the other computes.
template <typename Reader, typename G, bool RESIDENT>
__global__ void __launch_bounds__(kRowThreads, 2)
    logits_rows_kernel(const __grid_constant__ LogitsRowsParams params, const __grid_constant__ RowLayout layout) {
#if __CUDA_ARCH__ < 900
  if constexpr (!RESIDENT)  // never launched there: no clusters, no bulk copies
#endif
    logits_rows_body<Reader, G, RESIDENT>(params, layout);
}

template <typename Reader, typename G, bool RESIDENT>
cudaError_t launch_rows(const LogitsRowsParams& params, const LogitsRowsPlan& plan, cudaStream_t stream) {
  const auto kernel = logits_rows_kernel<Reader, G, RESIDENT>;
  if (plan.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.rows * plan.cluster));
  config.blockDim = dim3(kRowThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = RESIDENT ? 1 : 0;
  if (RESIDENT) {  // as many clusters as fit at a time, which take the rows in turn
    cudaError_t error = cudaSuccess;
    int clusters = 0;
    if (plan.cluster > kPortableCluster) {  // not every part of a GPU has so many multiprocessors side by side
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess || clusters == 0) {
      cudaGetLastError();
      return cudaErrorInvalidClusterSize;
    }
    if (clusters < params.rows) config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster));
  }
  return cudaLaunchKernelEx(&config, kernel, params, plan.layout);
}

template <typename Reader, typename G>
cudaError_t launch_rows(const LogitsRowsParams& p, const LogitsRowsPlan& plan, cudaStream_t stream) {
  if constexpr (Reader::kVec > 1) {  // others are not copied in whole vectors
    if (plan.resident) return launch_rows<Reader, G, true>(p, plan, stream);
  }
  return launch_rows<Reader, G, false>(p, plan, stream);
}

// Run-time flags to template booleans. Rows off 16 bytes are read entry by entry, through the general transform.
template <typename T, typename G>
cudaError_t dispatch_rows(const LogitsRowsParams& p, const LogitsRowsPlan& plan, bool aligned, cudaStream_t stream) {
  const auto run = [&](auto aligned_, auto transformed_) {
    return launch_rows<RowReader<LogitsRowsParams, T, decltype(aligned_)::value, decltype(transformed_)::value>, G>(
        p, plan, stream);
  };
  using std::false_type, std::true_type;
  if (!aligned) return run(false_type{}, true_type{});
  return transforms_fully(p) ? run(true_type{}, true_type{}) : run(true_type{}, false_type{});
}

template <typename G>
cudaError_t dispatch_pairs(const LogitsRowsParams& p, const LogitsRowsPlan& plan, cudaStream_t stream) {
  return launch_rows<PairReader<LogitsRowsParams>, G>(p, plan, stream);
}

template <typename T, bool ALIGNED, bool TRANSFORMED>
__global__ void __launch_bounds__(kGradientThreads, 4)  // 64 registers
    logits_gradient_kernel(const __grid_constant__ LogitsGradientParams params, int blocks_per_row) {
  logits_gradient_body<T, ALIGNED, TRANSFORMED>(params, blocks_per_row);
}

template <typename T>
cudaError_t dispatch_gradient(const LogitsGradientParams& p, bool aligned, cudaStream_t stream) {
  const auto [blocks, blocks_per_row] = gradient_grid(p, aligned ? kVectorBytes / static_cast<int64_t>(sizeof(T)) : 1);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (!aligned) {
    logits_gradient_kernel<T, false, true><<<grid, kGradientThreads, 0, stream>>>(p, blocks_per_row);
  } else if (transforms_fully(p)) {
    logits_gradient_kernel<T, true, true><<<grid, kGradientThreads, 0, stream>>>(p, blocks_per_row);
  } else {
    logits_gradient_kernel<T, true, false><<<grid, kGradientThreads, 0, stream>>>(p, blocks_per_row);
  }
  return cudaGetLastError();
}

extern template cudaError_t dispatch_gradient<float>(const LogitsGradientParams&, bool, cudaStream_t);
extern template cudaError_t dispatch_gradient<__nv_bfloat16>(const LogitsGradientParams&, bool, cudaStream_t);
extern template cudaError_t dispatch_gradient<__half>(const LogitsGradientParams&, bool, cudaStream_t);
extern template cudaError_t dispatch_pairs<__nv_bfloat16>(const LogitsRowsParams&, const LogitsRowsPlan&, cudaStream_t);
extern template cudaError_t dispatch_pairs<__half>(const LogitsRowsParams&, const LogitsRowsPlan&, cudaStream_t);
extern template cudaError_t dispatch_rows<float, float>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                        cudaStream_t);
extern template cudaError_t dispatch_rows<float, __nv_bfloat16>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                                cudaStream_t);
extern template cudaError_t dispatch_rows<float, __half>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                         cudaStream_t);
extern template cudaError_t dispatch_rows<__nv_bfloat16, __nv_bfloat16>(const LogitsRowsParams&, const LogitsRowsPlan&,
                                                                        bool, cudaStream_t);
extern template cudaError_t dispatch_rows<__half, __half>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                          cudaStream_t);

}  // namespace vigos
