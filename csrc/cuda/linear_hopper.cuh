// Both projections and the online statistics in one kernel for Hopper; no logit is stored.
//
//   z_s = alpha student_hidden student_weight^T, z_t likewise, tile by tile of 128 rows x 128 vocabulary entries
//   statistics: RowStats of each row over a part of the vocabulary -> partial; merged by linear_merge
//   gradient:   the same tiles computed again -> dlogits, bf16, a chunk of rows at a time
//
// One producer warp copies tiles of hidden states and heads through the bulk tensor copy engine into kStages stages;
// two consumer warpgroups of 64 rows each multiply them with wgmma into fp32 accumulators, student and teacher side by
// side, so that a thread holds both logits of an entry and the epilogue is local to it. With a shared head its tile is
// read once for both. Each side 128 x 128 accumulators: 128 registers a thread. Traffic a tile and 64 entries of K: 48
// KB (64 KB with two heads) from L2 for 4.2 MFLOP. Kinds: forward and reverse KL. Sizes: d and d_t multiples of 8
// (16-byte rows); K beyond them is read as 0.
#pragma once

#include "linear_hopper.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>

#include "device.cuh"
#endif
#if defined(__CUDACC__) || defined(VIGOS_EMULATED)
#include "hopper.cuh"
#endif

namespace vigos {

constexpr int kTileM = 128, kTileN = 128, kTileK = 64;
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

enum class HopperMode { kStatistics, kGradient };

#if defined(__CUDACC__) || defined(VIGOS_EMULATED)

struct HopperMaps {
  hopper::TensorMap student_hidden, teacher_hidden, student_weight, teacher_weight;
};

__device__ __forceinline__ void store_running(const RowStats& x, float* partial, int64_t stride) {
  const float fields[kRunningFields] = {x.max_s,  x.max_t,    x.offset,   x.sum_s, x.sum_t,
                                        x.excess, x.moment_s, x.moment_t, x.gap};
#pragma unroll
  for (int i = 0; i < kRunningFields; ++i) partial[i * stride] = fields[i];
}

__device__ __forceinline__ RowStats load_running(const float* partial, int64_t stride) {
  RowStats x;
  x.max_s = partial[0];
  x.max_t = partial[stride];
  x.offset = partial[2 * stride];
  x.sum_s = partial[3 * stride];
  x.sum_t = partial[4 * stride];
  x.excess = partial[5 * stride];
  x.moment_s = partial[6 * stride];
  x.moment_t = partial[7 * stride];
  x.gap = partial[8 * stride];
  return x;
}

__device__ __forceinline__ RowStats shuffled_running(const RowStats& x, int mask) {
  RowStats y;
  y.max_s = device::shuffle_xor(x.max_s, mask);
  y.max_t = device::shuffle_xor(x.max_t, mask);
  y.offset = device::shuffle_xor(x.offset, mask);
  y.sum_s = device::shuffle_xor(x.sum_s, mask);
  y.sum_t = device::shuffle_xor(x.sum_t, mask);
  y.excess = device::shuffle_xor(x.excess, mask);
  y.moment_s = device::shuffle_xor(x.moment_s, mask);
  y.moment_t = device::shuffle_xor(x.moment_t, mask);
  y.gap = device::shuffle_xor(x.gap, mask);
  return y;
}

// A thread's logits of one tile, accumulated raw: [4 j + 2 h + c] is its row h, column 8 j + 2 (lane % 4) + c.
struct TileLogits {
  float student[64], teacher[64];
};

// The tile loop's place in the ring of stages.
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

// tiles [first, last) of the vocabulary for the rows from row0 on.
template <bool SHARED_HEAD>
__device__ __forceinline__ void produce(const HopperMaps& maps, char* tiles, uint64_t* full, uint64_t* empty, int row0,
                                        int64_t first, int64_t last, int k_steps) {
  using Shared = HopperShared<SHARED_HEAD>;
  Ring ring;
  for (int64_t tile = first; tile < last; ++tile) {
    const int column0 = static_cast<int>(tile * kTileN);
    for (int k = 0; k < k_steps; ++k) {
      hopper::barrier_wait(&empty[ring.stage], ring.phase ^ 1);
      uint64_t* const barrier = &full[ring.stage];
      char* const dest = tiles + ring.stage * Shared::kStageBytes;
      hopper::barrier_arrive_expect(barrier, Shared::kStageBytes);
      hopper::copy_box(dest, &maps.student_hidden, k * kTileK, row0, barrier);
      hopper::copy_box(dest + kTileBytes, &maps.teacher_hidden, k * kTileK, row0, barrier);
      hopper::copy_box(dest + 2 * kTileBytes, &maps.student_weight, k * kTileK, column0, barrier);
      if constexpr (!SHARED_HEAD) {
        hopper::copy_box(dest + 3 * kTileBytes, &maps.teacher_weight, k * kTileK, column0, barrier);
      }
      ring.next<Shared::kStages>();
    }
  }
}

// Multiplies one tile; the consumer's rows are 64 `group` + ... of the tile.
template <bool SHARED_HEAD>
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
      hopper::wgmma_m64n128k16(z.student, hopper::descriptor(student + 32 * i),
                               hopper::descriptor(student_head + 32 * i), accumulate);
      hopper::wgmma_m64n128k16(z.teacher, hopper::descriptor(teacher + 32 * i),
                               hopper::descriptor(teacher_head + 32 * i), accumulate);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<1>();  // the products before these are done: their stage is free
    if (k > 0 && lane == 0) hopper::barrier_arrive(&empty[before]);
    before = ring.stage;
    ring.next<Shared::kStages>();
  }
  hopper::wgmma_wait<0>();
  hopper::wgmma_pin(z.student);
  hopper::wgmma_pin(z.teacher);
  if (lane == 0) hopper::barrier_arrive(&empty[before]);
}

// Adds a tile to the running statistics of the thread's two rows. Columns from `limit` on do not exist.
__device__ __forceinline__ void add_tile(RowStats (&rows)[2], const bool (&reverse)[2], TileLogits& z, float alpha,
                                         int64_t column0, int64_t limit, int lane) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const bool exists = column0 + 8 * (i / 4) + 2 * (lane % 4) + i % 2 < limit;
    z.student[i] = exists ? z.student[i] * alpha : -INFINITY;
    z.teacher[i] = exists ? z.teacher[i] * alpha : -INFINITY;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float max_s = -INFINITY, max_t = -INFINITY;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      max_s = fmaxf(max_s, z.student[j / 2 * 4 + 2 * h + j % 2]);
      max_t = fmaxf(max_t, z.teacher[j / 2 * 4 + 2 * h + j % 2]);
    }
    raise(rows[h], max_s * kLog2E, max_t * kLog2E, reverse[h]);
    const float shift = rows[h].shift(), shift_t = rows[h].shift_t();
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float z_s = z.student[j / 2 * 4 + 2 * h + j % 2], z_t = z.teacher[j / 2 * 4 + 2 * h + j % 2];
      add(rows[h], {z_s, z_t, z_s - z_t}, 1.0f, shift, shift_t, reverse[h]);
    }
  }
}

// Two neighbouring bf16 entries.
struct alignas(4) Bf16Pair {
  __nv_bfloat16 value[2];
};

__device__ __forceinline__ void store_tile(const LinearHopperParams& p, const Row (&rows)[2], const float (&live)[2],
                                           const TileLogits& z, const int64_t (&index)[2], int64_t column0, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (index[h] >= p.rows) continue;
    __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(p.dlogits) + index[h] * p.stride_dlogits;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int64_t column = column0 + 8 * j + 2 * (lane % 4);
      Bf16Pair pair;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float z_s = z.student[4 * j + 2 * h + c] * p.alpha, z_t = z.teacher[4 * j + 2 * h + c] * p.alpha;
        const Entry e = entry_of(rows[h], {z_s, z_t, z_s - z_t});
        const bool counts = live[h] != 0.0f && column + c < p.logical_vocab;
        pair.value[c] = __nv_bfloat16(counts ? p.alpha * gradient(rows[h], e) : 0.0f);
      }
      if (column + 1 < p.vocab) {
        *reinterpret_cast<Bf16Pair*>(out + column) = pair;
      } else if (column < p.vocab) {
        out[column] = pair.value[0];
      }
    }
  }
}

template <bool SHARED_HEAD, HopperMode MODE>
__device__ __forceinline__ void linear_hopper_body(const LinearHopperParams& p, const HopperMaps& maps) {
  using Shared = HopperShared<SHARED_HEAD>;
  char* const raw = device::shared_memory();
  char* const tiles = raw + (1024 - hopper::shared_address(raw) % 1024) % 1024;
  uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + Shared::kStages * Shared::kStageBytes);
  uint64_t* const empty = full + Shared::kStages;

  // Blocks of one part of the vocabulary are neighbours, so that they find its head in L2.
  const int64_t row_tiles = (p.rows + kTileM - 1) / kTileM;
  const int64_t split = device::block_index() / row_tiles;
  const int row0 = static_cast<int>(device::block_index() % row_tiles) * kTileM;
  const int64_t tiles_in_all = (p.vocab + kTileN - 1) / kTileN;
  const int64_t each = (tiles_in_all + p.splits - 1) / p.splits;
  const int64_t first = split * each, last = first + each < tiles_in_all ? first + each : tiles_in_all;
  const int64_t widest = p.d > p.d_t ? p.d : p.d_t;
  const int k_steps = static_cast<int>((widest + kTileK - 1) / kTileK);

  const int thread = device::thread_index();
  if (thread == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      hopper::barrier_init(&full[i], 1);
      hopper::barrier_init(&empty[i], 4 * kConsumers);  // one arrival a consuming warp
    }
    hopper::barrier_init_fence();
  }
  device::block_sync();

  if (thread < 128) {
    hopper::registers_down<24>();
    if (thread == 0) {
      hopper::prefetch_map(&maps.student_hidden);
      hopper::prefetch_map(&maps.teacher_hidden);
      hopper::prefetch_map(&maps.student_weight);
      if constexpr (!SHARED_HEAD) hopper::prefetch_map(&maps.teacher_weight);
      produce<SHARED_HEAD>(maps, tiles, full, empty, row0, first, last, k_steps);
    }
  } else {
    hopper::registers_up<240>();
    const int group = thread / 128 - 1, lane = thread % 32;
    const int64_t top = row0 + 64 * group + 16 * (thread % 128 / 32) + lane / 4;
    const int64_t index[2] = {top, top + 8};
    Ring ring;
    TileLogits z;

    if constexpr (MODE == HopperMode::kStatistics) {
      RowStats rows[2];
      bool reverse[2];
      int64_t label[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool exists = index[h] < p.rows;
        reverse[h] = exists && p.kind[index[h]] == kReverseKL;
        label[h] = exists && p.labels ? p.labels[index[h]] : -1;
      }
      for (int64_t tile = first; tile < last; ++tile) {
        multiply<SHARED_HEAD>(z, tiles, full, empty, ring, group, lane, k_steps);
        add_tile(rows, reverse, z, p.alpha, tile * kTileN, p.logical_vocab, lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (label[h] / kTileN != tile || label[h] < 0) continue;
          const int column = static_cast<int>(label[h] % kTileN);
#pragma unroll
          for (int j = 0; j < 32; ++j) {  // an index known at compile time: a run-time one would move z to memory
            if (8 * (j / 2) + 2 * (lane % 4) + j % 2 == column) {
              p.label_logits[index[h]] = z.student[j / 2 * 4 + 2 * h + j % 2];
              p.label_logits[p.rows + index[h]] = z.teacher[j / 2 * 4 + 2 * h + j % 2];
            }
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // four lanes share a row
        merge(rows[h], shuffled_running(rows[h], 1), reverse[h]);
        merge(rows[h], shuffled_running(rows[h], 2), reverse[h]);
        if (lane % 4 == 0 && index[h] < p.rows) {
          store_running(rows[h], p.partial + split * p.rows + index[h], p.splits * p.rows);
        }
      }
    } else {
      Row rows[2];
      float live[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = index[h] < p.rows ? index[h] : 0;
        rows[h] = restore(p.state + r * State::kColumns, static_cast<Kind>(p.kind[r]), 0.5f, INFINITY, 1.0f);
        live[h] = p.live[r];
      }
      for (int64_t tile = first; tile < last; ++tile) {
        multiply<SHARED_HEAD>(z, tiles, full, empty, ring, group, lane, k_steps);
        store_tile(p, rows, live, z, index, tile * kTileN, lane);
      }
    }
  }
}

// One thread a row: the parts of the vocabulary, in order.
__device__ __forceinline__ void linear_merge_body(const LinearHopperParams& p, int64_t r) {
  const Kind kind = static_cast<Kind>(p.kind[r]);
  RowStats stats = load_running(p.partial + r, p.splits * p.rows);
  for (int64_t split = 1; split < p.splits; ++split) {
    merge(stats, load_running(p.partial + split * p.rows + r, p.splits * p.rows), kind == kReverseKL);
  }
  const Row row = finish(stats, kind, 0.5f, INFINITY, 1.0f);
  p.divergence[r] = row.divergence();
  p.clipped[r] = row.divergence() > p.clip[r];
  p.student_entropy[r] = stats.entropy_s();
  p.teacher_entropy[r] = stats.entropy_t();
  p.student_lse[r] = stats.lse_s();
  p.teacher_lse[r] = stats.lse_t();
  if (p.labels) {
    p.student_logprob[r] = p.label_logits[r] - stats.lse_s();
    p.teacher_logprob[r] = p.label_logits[p.rows + r] - stats.lse_t();
  }
  save(row, p.state + r * State::kColumns);
}

#endif  // a compiler for kernels

}  // namespace vigos
