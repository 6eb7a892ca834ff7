// The Hopper primitives of the row kernels and of the product (PTX ISA 8.1, sm_90a): mbarrier, bulk tensor copy, wgmma,
// register counts. The tests put a host emulation behind the same names; the descriptor is this one there too.
#pragma once

#include <cstdint>
#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace vigos::hopper {

// Operand in shared memory as the copy engine wrote it with 128-byte swizzle: rows of 64 16-bit entries along K (128
// bytes), groups of 8 rows 1,024 bytes apart. The tile starts on 1,024 bytes; `address` may lie 32, 64 or 96 bytes into
// its first row: the next 16 entries of K.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kStrideBytes = 1024, kSwizzle128 = 1;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (1ull << 16) | ((kStrideBytes >> 4) << 32) |
         (kSwizzle128 << 62);
}

// Two neighbouring entries of a row, 4 bytes each.
struct alignas(8) TwoPairs {
  uint32_t value[2];
};

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier: a phase ends when all arrivals came and every announced byte was written ------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine; a block barrier must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// At the barrier that block `rank` of the cluster has in this one's place. What it says is that reads have ended:
// nothing is to be made visible, and a fence over the cluster at each stage would cost more than the products.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity; a fresh barrier is in phase 0, and its phase -1 (parity 1) has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// --- bulk copy: `bytes` bytes, a multiple of 16, from a multiple of 16 to one ----------------------------------------

__device__ __forceinline__ void copy_bytes(void* dest, const void* source, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(dest)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// --- bulk tensor copy: a box of a row-major matrix into shared memory; entries outside come as 0 --------------

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_box(void* dest, const TensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(dest)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same into every block of the cluster that `blocks` has a bit for: the box, and its bytes at the barrier, in the
// places that they have in this block.
__device__ __forceinline__ void copy_box_to_all(void* dest, const TensorMap* map, int column, int row,
                                                uint64_t* barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(dest)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of the accumulators over the asynchronous products.
__device__ __forceinline__ void wgmma_pin(float (&d)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64, 128) = a (64, 16) b (128, 16)^T + (accumulate ? d : 0), bf16 or fp16 operands, fp32 accumulators. Of the
// warpgroup's thread t: d[4 j + 2 h + c] is row 16 (t / 32) + t % 32 / 4 + 8 h, column 8 j + 2 (t % 4) + c.
#define VIGOS_WGMMA(TYPE)                                      \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                 \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
  " {"                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, "                           \
  "%8, %9, %10, %11, %12, %13, %14, %15, "                     \
  "%16, %17, %18, %19, %20, %21, %22, %23, "                   \
  "%24, %25, %26, %27, %28, %29, %30, %31, "                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, "                   \
  "%40, %41, %42, %43, %44, %45, %46, %47, "                   \
  "%48, %49, %50, %51, %52, %53, %54, %55, "                   \
  "%56, %57, %58, %59, %60, %61, %62, %63"                     \
  "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
template <bool BFLOAT>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
#define VIGOS_WGMMA_ARGUMENTS                                                                                 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),                           \
      "+f"(d[63]) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
  if constexpr (BFLOAT) {
    asm volatile(VIGOS_WGMMA("bf16") : VIGOS_WGMMA_ARGUMENTS);
  } else {
    asm volatile(VIGOS_WGMMA("f16") : VIGOS_WGMMA_ARGUMENTS);
  }
}
#undef VIGOS_WGMMA_ARGUMENTS
#undef VIGOS_WGMMA

// --- fp16 ------------------------------------------------------------------------------------------------------------

// `first` in the lower half, both rounded to nearest; finite numbers stay finite, NaN stays.
__device__ __forceinline__ uint32_t half_pair(float first, float second) {
  uint32_t both;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// --- registers of a warpgroup ----------------------------------------------------------------------------------------

template <int COUNT>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#endif  // __CUDACC__

}  // namespace vigos::hopper
