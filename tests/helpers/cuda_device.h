// The names of csrc/cuda/device.cuh and of hopper.cuh over the fibers. Copies and products are as asynchronous as the
// PTX manual allows: a box is undefined from its issue until its barrier has counted the bytes, a product reads shared
// memory at any time up to the wait that names it, and its accumulators are NaN to the thread until then.
#pragma once

#include <cmath>

#include "cuda_fibers.h"

#define VIGOS_EMULATED
#define __device__
#define __forceinline__ inline

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
  explicit operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

using float16 = _Float16;

}  // namespace emulator

namespace vigos::device {

using half = emulator::float16;

inline int thread_index() { return emulator::current().thread; }
inline int64_t block_index() { return emulator::current().block->index; }
inline int64_t block_count() { return emulator::run->blocks; }
inline void block_sync() { emulator::wait(emulator::current().block->barrier); }
inline float shuffle_xor(float x, int mask) {
  const int lane = thread_index() % 32;
  emulator::Warp& warp = emulator::current().block->warps[thread_index() / 32];
  float (&slots)[32] = warp.slots[warp.barrier.generation % 2];  // those of the shuffle before are still read
  slots[lane] = x;
  emulator::wait(warp.barrier);
  return slots[lane ^ mask];
}
template <typename T>
T* known(T* address) {
  return address;
}
inline char* shared_memory() { return emulator::current().block->shared.data(); }
inline uint4 load(const uint4* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) emulator::fail("a 16-byte load is not aligned");
  return *address;
}
inline int cluster_rank() { return emulator::current().block->rank; }
inline int cluster_size() { return static_cast<int>(emulator::current().block->cluster->blocks.size()); }
inline void cluster_sync() { emulator::wait_for_cluster(*emulator::current().block); }
template <typename T>
const T* cluster_map(T* shared, int rank) {
  if (rank < 0 || rank >= cluster_size()) emulator::fail("the cluster has no block of that rank");
  const ptrdiff_t offset = reinterpret_cast<char*>(shared) - shared_memory();
  return reinterpret_cast<const T*>(emulator::current().block->cluster->blocks[rank].shared.data() + offset);
}

}  // namespace vigos::device

namespace vigos::hopper {

constexpr uint32_t kWindow = 1024 + 16;  // the address of a block's first byte: no tile's alignment by itself
constexpr int kBoxRows = 128, kBoxRowBytes = 128;

// Rows of 16-bit numbers; a box of it is 128 rows of 64 entries, written with the swizzle of 128 bytes.
struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, stride;
};

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - device::shared_memory()) + kWindow;
}

// The 8 bytes of a barrier: phases ended, arrivals wanted, arrivals missing, bytes missing by 16.
struct BarrierState {
  uint16_t phase, wanted, missing;
  int16_t granules;
};

inline BarrierState& state(uint64_t* barrier) {
  BarrierState& b = *reinterpret_cast<BarrierState*>(barrier);
  if (b.wanted == 0xffff) emulator::fail("a barrier is used before it is initialised");
  return b;
}
inline void settle(BarrierState& b) {
  if (b.missing == 0 && b.granules == 0) {
    ++b.phase;
    b.missing = b.wanted;
  }
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  *reinterpret_cast<BarrierState*>(barrier) = {0, count, count, 0};
  emulator::current().block->barriers_unfenced = true;
}
inline void barrier_init_fence() { emulator::current().block->barriers_unfenced = false; }
inline void barrier_arrive(uint64_t* barrier) {
  BarrierState& b = state(barrier);
  if (b.missing == 0) emulator::fail("an arrival too many");
  --b.missing;
  settle(b);
}
// What block `rank` of the cluster has in the place of something of this block's.
template <typename T>
T* peer(T* mine, int rank) {
  return const_cast<T*>(device::cluster_map(mine, rank));
}
inline void barrier_arrive_at(uint64_t* barrier, int rank) { barrier_arrive(peer(barrier, rank)); }
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  state(barrier).granules += static_cast<int16_t>(bytes / 16);
  barrier_arrive(barrier);
}

inline void prefetch_map(const TensorMap*) {}

// Bits 4..6 of an address are exclusive-ored with bits 7..9, as many of them as a row of the tile has bytes.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4);
}

inline void copy_box_to(emulator::Block& block, char* to, const TensorMap* map, int column, int row,
                        uint64_t* barrier) {
  if (emulator::current().block->barriers_unfenced) {
    emulator::fail("the copy engine is given a barrier before the fence");
  }
  std::memset(to, emulator::kPoison, kBoxRows * kBoxRowBytes);
  constexpr int kRowsAPart = 32;
  block.copies.push_back([=, first = 0]() mutable {
    for (int i = first; i < first + kRowsAPart; ++i) {
      for (int j = 0; j < 64; ++j) {
        const bool inside = row + i < map->rows && column + j < map->columns;
        const uint16_t x = inside ? map->data[(row + i) * map->stride + column + j] : uint16_t{0};
        std::memcpy(to + swizzled(kBoxRowBytes * i + 2 * j, kBoxRowBytes), &x, 2);
      }
    }
    first += kRowsAPart;
    BarrierState& b = *reinterpret_cast<BarrierState*>(barrier);
    b.granules -= kRowsAPart * kBoxRowBytes / 16;
    settle(b);
    return first == kBoxRows;
  });
}

inline void copy_box_to_all(void* to, const TensorMap* map, int column, int row, uint64_t* barrier, int blocks) {
  if (shared_address(to) % 1024) emulator::fail("a tile does not start on 1,024 bytes");
  emulator::Cluster& cluster = *emulator::current().block->cluster;
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    char* const there = peer(static_cast<char*>(to), rank);
    if (cluster.blocks[rank].left == 0) emulator::fail("a box is sent to a block that has ended");
    state(peer(barrier, rank));
    copy_box_to(cluster.blocks[rank], there, map, column, row, peer(barrier, rank));
  }
}
inline void copy_box(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  copy_box_to_all(to, map, column, row, barrier, 1 << device::cluster_rank());
}

// In halves, so that one may be there and the other not.
inline void copy_bytes(void* to, const void* source, int bytes, uint64_t* barrier) {
  if (shared_address(to) % 16 || reinterpret_cast<uintptr_t>(source) % 16 || bytes % 16)
    emulator::fail("a bulk copy is not of whole 16 bytes");
  emulator::Block& block = *emulator::current().block;
  if (block.barriers_unfenced) emulator::fail("the copy engine is given a barrier before the fence");
  std::memset(to, emulator::kPoison, bytes);
  block.copies.push_back([=, half = 0]() mutable {
    const int begin = half == 0 ? 0 : bytes / 32 * 16, end = half == 0 ? bytes / 32 * 16 : bytes;
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(source) + begin, end - begin);
    BarrierState& b = *reinterpret_cast<BarrierState*>(barrier);
    b.granules -= (end - begin) / 16;
    settle(b);
    return ++half == 2;
  });
}

// 16 entries along K of a row of an operand, found as the PTX manual decodes a descriptor (K-major).
template <typename T>
void operand(uint64_t descriptor, int row, float (&out)[16]) {
  const auto bytes = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = bytes(0), leading = bytes(16), stride = bytes(32), mode = descriptor >> 62;
  if (descriptor >> 49 & 7) emulator::fail("a base offset, which this emulation does not know");
  const uint32_t row_bytes = mode == 0 ? 16 : 256 >> mode;  // 1, 2, 3: swizzles of 128, 64 and 32 bytes
  const emulator::Guarded& shared = emulator::current().block->shared;
  for (int half = 0; half < 2; ++half) {
    const uint32_t along = mode == 0 ? half * leading : 16 * half;
    const uint32_t at = swizzled(start + row / 8 * stride + row % 8 * row_bytes + along, row_bytes) - kWindow;
    if (at + 16 > shared.bytes()) emulator::fail("a descriptor points out of shared memory");
    T entries[8];
    std::memcpy(entries, shared.data() + at, 16);
    for (int k = 0; k < 8; ++k) out[8 * half + k] = static_cast<float>(entries[k]);
  }
}

// A thread's part of d (64, 128) = a (64, 16) b (128, 16)^T + d; which, says hopper.cuh.
template <typename T>
void multiply(const emulator::Product& product, std::array<float, 64>& d) {
  const int t = device::thread_index() % 128;
  float a[2][16], b[16];
  for (int h = 0; h < 2; ++h) operand<T>(product.a, 16 * (t / 32) + t % 32 / 4 + 8 * h, a[h]);
  for (int j = 0; j < 32; ++j) {
    operand<T>(product.b, 8 * (j / 2) + 2 * (t % 4) + j % 2, b);
    for (int h = 0; h < 2; ++h) {
      float& sum = d[j / 2 * 4 + 2 * h + j % 2];
      if (!product.accumulate) sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[h][k] * b[k];
    }
  }
}

// Those of groups before `group` that have not run yet.
inline void run_products(int group) {
  emulator::Products& products = emulator::current().products;
  for (emulator::Product& product : products.queue) {
    if (product.group >= group || product.done) continue;
    std::array<float, 64>& d = products.in_flight.at(product.d);
    product.bfloat ? multiply<emulator::bfloat16>(product, d) : multiply<emulator::float16>(product, d);
    product.done = true;
  }
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::yield_until([barrier, parity] { return (state(barrier).phase & 1) != parity; });
  if (emulator::chance(emulator::run->product_chance)) run_products(INT32_MAX);
}

inline void wgmma_fence() { emulator::current().products.fenced = true; }
inline void wgmma_commit() { ++emulator::current().products.group; }
template <int PENDING>
void wgmma_wait() {
  emulator::Products& products = emulator::current().products;
  const int ended = products.group - PENDING;
  run_products(ended);
  emulator::wait(emulator::current().block->warps[device::thread_index() / 32].barrier);  // .sync.aligned: of a warp
  std::erase_if(products.queue, [ended](const emulator::Product& product) { return product.group < ended; });
  std::erase_if(products.in_flight, [&products](const auto& accumulators) {
    for (const emulator::Product& product : products.queue) {
      if (product.d == accumulators.first) return false;
    }
    std::memcpy(accumulators.first, accumulators.second.data(), sizeof accumulators.second);
    products.fenced = false;  // the thread uses the registers from here on
    return true;
  });
}
inline void wgmma_pin(float (&)[64]) {}

template <bool BFLOAT>
void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  emulator::Products& products = emulator::current().products;
  const auto [accumulators, first] = products.in_flight.try_emplace(d);
  if (first) {
    if (!products.fenced) emulator::fail("products start on registers that no fence has ordered");
    std::memcpy(accumulators->second.data(), d, sizeof d);
    for (float& x : d) x = NAN;
  }
  products.queue.push_back({d, a, b, accumulate, BFLOAT, products.group});
  if (emulator::chance(emulator::run->product_chance)) run_products(INT32_MAX);
}

inline uint32_t half_pair(float first, float second) {
  const auto half = [](float x) {
    const auto y = static_cast<emulator::float16>(x != x ? x : std::fmin(std::fmax(x, -65504.0f), 65504.0f));
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return static_cast<uint32_t>(bits);
  };
  return half(first) | half(second) << 16;
}

template <int COUNT>
void registers_down() {}
template <int COUNT>
void registers_up() {}

}  // namespace vigos::hopper
