// The few primitives of a thread block and its cluster that the row kernel uses, under names of our own: the tests put
// a host emulation behind the same names and run the kernel without a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>

namespace vigos::device {

using half = __half;

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_count() { return gridDim.x; }
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// The address is kept in registers and not computed again at each use.
template <typename T>
__device__ __forceinline__ T* known(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

// Dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ uint4 load(const uint4* address) { return *address; }

// Thread-block clusters exist from sm_90 on. Below it a block is its own cluster, so that one source compiles for both;
// the launcher starts clusters on sm_90 and later only.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <typename T>
__device__ __forceinline__ const T* cluster_map(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ const T* cluster_map(T* shared, int) {
  return shared;
}
#endif

}  // namespace vigos::device
