// The logits of both sides from one kernel on Hopper, which leaves 4 bytes of an entry's 8:
//
//   z_s = student_hidden student_weight^T, z_t likewise, fp32 in registers, a tile of 128 rows x 128 entries at a time
//   tops[r, tile] = the row's largest z_t in the tile      pairs[r, v] = fp16 (z_t - top), fp16 (z_s - z_t)
//
// Error: each number to 2^-11 of itself, so that entries near a tile's top, which carry the probability, and gaps of
// models that agree keep their digits; finite numbers past 65,504 become that, NaN stays. What the row kernel makes of
// them (PairReader in row_reader.cuh) is 0.3 % off in the gradient where the teacher is close to its student.
//
// A cluster of two blocks takes two neighbouring tiles of the vocabulary for the same rows. One producer warp a block
// copies through the bulk tensor copy engine into kStages stages: its own tile of the head, and the hidden states of
// one side for both blocks; with a shared head 32 KB instead of 48 come from L2 a tile and 64 entries of K, 4.2 MFLOP.
// Two consumer warpgroups of 64 rows each multiply with wgmma into fp32 accumulators, student and teacher side by side,
// so that a thread holds both logits of an entry. Clusters stay for all their tiles: the first operands of the next one
// are copied while results are stored. Sizes: d and d_t multiples of 8 (16-byte rows); K beyond them is read as 0.
#pragma once

#include "linear_hopper.h"
#if defined(__CUDACC__)
#include "device.cuh"
#endif
#if defined(__CUDACC__) || defined(VIGOS_EMULATED)
#include "hopper.cuh"
#endif

namespace vigos {

constexpr int kTileK = 64;
constexpr int kClusterTiles = 2;                        // blocks of a cluster, and their tiles
constexpr int kConsumers = 2;                           // warpgroups
constexpr int kHopperThreads = 128 * (1 + kConsumers);  // the first warpgroup produces
constexpr int kTileBytes = kTileM * kTileK * 2;         // of each operand: 128 rows of 128 bytes

template <bool SHARED_HEAD>
struct HopperShared {
  static constexpr int kOperands = SHARED_HEAD ? 3 : 4;
  static constexpr int kStages = SHARED_HEAD ? 4 : 3;
  static constexpr int kStageBytes = kOperands * kTileBytes;
  static constexpr int kBytes = kStages * kStageBytes + 2 * kStages * 8 + 1024;  // barriers; slack to align the tiles
};

VIGOS_HD uint32_t row_tiles(const PairProductParams& p) {
  return static_cast<uint32_t>((p.rows + kTileM - 1) / kTileM);
}
VIGOS_HD int64_t vocab_tiles(const PairProductParams& p) { return (p.vocab + kTileN - 1) / kTileN; }
VIGOS_HD int64_t cluster_tiles(const PairProductParams& p) {
  return row_tiles(p) * ((vocab_tiles(p) + kClusterTiles - 1) / kClusterTiles);
}

#if defined(__CUDACC__) || defined(VIGOS_EMULATED)

struct HopperMaps {
  hopper::TensorMap student_hidden, teacher_hidden, student_weight, teacher_weight;
};

// A thread's logits of one tile: [4 j + 2 h + c] is its row h, column 8 j + 2 (lane % 4) + c.
struct TileLogits {
  float student[64], teacher[64];
};

// The place in the ring of stages, the same in both blocks.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int STAGES>
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A block's place in the result. Clusters that run at one time share a tile of the head, which they find in L2.
struct TilePlace {
  int row0;
  int tile;  // of the vocabulary; one past the last where their number is odd
  __device__ __forceinline__ TilePlace(const PairProductParams& p, uint32_t index, int rank)
      : row0(static_cast<int>(index % row_tiles(p)) * kTileM),
        tile(static_cast<int>(index / row_tiles(p)) * kClusterTiles + rank) {}
};

template <bool SHARED_HEAD>
__device__ __forceinline__ void produce(const HopperMaps& maps, char* tiles, uint64_t* full, uint64_t* empty,
                                        const TilePlace& place, Ring& ring, int rank, int k_steps) {
  using Shared = HopperShared<SHARED_HEAD>;
  const int column0 = place.tile * kTileN;
  for (int k = 0; k < k_steps; ++k) {
    hopper::barrier_wait(&empty[ring.stage], ring.phase ^ 1);
    uint64_t* const barrier = &full[ring.stage];
    char* const dest = tiles + ring.stage * Shared::kStageBytes;
    hopper::barrier_arrive_expect(barrier, Shared::kStageBytes);
    // Each block is sent both sides' rows: the student's by rank 0, the teacher's by rank 1.
    hopper::copy_box_to_all(dest + rank * kTileBytes, rank == 0 ? &maps.student_hidden : &maps.teacher_hidden,
                            k * kTileK, place.row0, barrier, (1 << kClusterTiles) - 1);
    hopper::copy_box(dest + 2 * kTileBytes, &maps.student_weight, k * kTileK, column0, barrier);
    if constexpr (!SHARED_HEAD) {
      hopper::copy_box(dest + 3 * kTileBytes, &maps.teacher_weight, k * kTileK, column0, barrier);
    }
    ring.next<Shared::kStages>();
  }
}

// Tells both blocks' producers that a warp of this one needs the stage no more.
__device__ __forceinline__ void release(uint64_t* empty, int lane) {
  if (lane < kClusterTiles) hopper::barrier_arrive_at(empty, lane);
}

// Multiplies one tile; the consumer's rows are 64 `group` + ... of the tile.
template <bool SHARED_HEAD, bool BFLOAT>
__device__ __forceinline__ void multiply(TileLogits& z, const char* tiles, uint64_t* full, uint64_t* empty, Ring& ring,
                                         int group, int lane, int k_steps) {
  using Shared = HopperShared<SHARED_HEAD>;
  constexpr int kRowsBytes = kTileBytes / kConsumers;
  int before = 0;  // the stage whose products may still be running
  hopper::wgmma_pin(z.student);
  hopper::wgmma_pin(z.teacher);
  for (int k = 0; k < k_steps; ++k) {
    hopper::barrier_wait(&full[ring.stage], ring.phase);
    const uint32_t base = hopper::shared_address(tiles + ring.stage * Shared::kStageBytes);
    const uint32_t student = base + group * kRowsBytes, teacher = student + kTileBytes;
    const uint32_t student_head = base + 2 * kTileBytes, teacher_head = base + (Shared::kOperands - 1) * kTileBytes;
    hopper::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileK / 16; ++i) {  // 16 entries of K are 32 bytes
      const bool accumulate = k > 0 || i > 0;
      hopper::wgmma_m64n128k16<BFLOAT>(z.student, hopper::descriptor(student + 32 * i),
                                       hopper::descriptor(student_head + 32 * i), accumulate);
      hopper::wgmma_m64n128k16<BFLOAT>(z.teacher, hopper::descriptor(teacher + 32 * i),
                                       hopper::descriptor(teacher_head + 32 * i), accumulate);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<1>();  // the products before these are done: their stage is free
    if (k > 0) release(&empty[before], lane);
    before = ring.stage;
    ring.next<Shared::kStages>();
  }
  hopper::wgmma_wait<0>();
  hopper::wgmma_pin(z.student);
  hopper::wgmma_pin(z.teacher);
  release(&empty[before], lane);
}

// The thread's two rows of a tile. 4 lanes share a row: each of their stores is 32 bytes, a whole sector.
__device__ __forceinline__ void store_tile(const PairProductParams& p, const TileLogits& z, int64_t row, int tile,
                                           int lane) {
  const int column0 = tile * kTileN + 2 * (lane % 4);
  const int64_t left = p.logical_vocab - column0;  // columns that are real, from the thread's first
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = -INFINITY;
    if (left >= kTileN) {
#pragma unroll
      for (int j = 0; j < 32; ++j) top = fmaxf(top, z.teacher[j / 2 * 4 + 2 * h + j % 2]);
    } else {
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        if (8 * (j / 2) + j % 2 < left) top = fmaxf(top, z.teacher[j / 2 * 4 + 2 * h + j % 2]);
      }
    }
    top = fmaxf(top, device::shuffle_xor(top, 1));
    top = fmaxf(top, device::shuffle_xor(top, 2));
    const int64_t r = row + 8 * h;
    if (r >= p.rows) continue;
    if (lane % 4 == 0) p.tops[r * p.stride_tops + tile] = top;
    hopper::TwoPairs* const out =
        reinterpret_cast<hopper::TwoPairs*>(static_cast<uint32_t*>(p.pairs) + r * p.stride_pairs + column0);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      hopper::TwoPairs two;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float z_s = z.student[4 * j + 2 * h + c], z_t = z.teacher[4 * j + 2 * h + c];
        two.value[c] = hopper::half_pair(z_t - top, z_s - z_t);
      }
      out[4 * j] = two;
    }
  }
}

template <bool SHARED_HEAD, bool BFLOAT>
__device__ __forceinline__ void pair_product_body(const PairProductParams& p, const HopperMaps& maps) {
  using Shared = HopperShared<SHARED_HEAD>;
  char* const raw = device::shared_memory();
  char* const tiles = raw + (1024 - hopper::shared_address(raw) % 1024) % 1024;
  uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + Shared::kStages * Shared::kStageBytes);
  uint64_t* const empty = full + Shared::kStages;
  const int rank = device::cluster_rank(), thread = device::thread_index();
  const uint32_t first = static_cast<uint32_t>(device::block_index()) / kClusterTiles;
  const uint32_t all = static_cast<uint32_t>(cluster_tiles(p)), clusters = static_cast<uint32_t>(p.clusters);
  const int64_t widest = p.d > p.d_t ? p.d : p.d_t;
  const int k_steps = static_cast<int>((widest + kTileK - 1) / kTileK);

  if (thread == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      hopper::barrier_init(&full[i], 1);
      hopper::barrier_init(&empty[i], kClusterTiles * 4 * kConsumers);  // one arrival a consuming warp of either block
    }
    hopper::barrier_init_fence();
  }
  device::cluster_sync();  // both blocks' barriers exist

  if (thread < 128) {
    hopper::registers_down<24>();
    if (thread == 0) {
      hopper::prefetch_map(rank == 0 ? &maps.student_hidden : &maps.teacher_hidden);
      hopper::prefetch_map(&maps.student_weight);
      if constexpr (!SHARED_HEAD) hopper::prefetch_map(&maps.teacher_weight);
      Ring ring;
      for (uint32_t i = first; i < all; i += clusters) {
        produce<SHARED_HEAD>(maps, tiles, full, empty, TilePlace(p, i, rank), ring, rank, k_steps);
      }
    }
  } else {
    hopper::registers_up<240>();
    const int group = thread / 128 - 1, lane = thread % 32;
    Ring ring;
    TileLogits z;
    for (uint32_t i = first; i < all; i += clusters) {
      const TilePlace place(p, i, rank);
      multiply<SHARED_HEAD, BFLOAT>(z, tiles, full, empty, ring, group, lane, k_steps);
      if (place.tile * kTileN >= p.vocab) continue;
      store_tile(p, z, place.row0 + 64 * group + 16 * (thread % 128 / 32) + lane / 4, place.tile, lane);
    }
  }
  device::cluster_sync();  // a block must outlive what the other sends it
}

#endif  // a compiler for kernels

}  // namespace vigos
