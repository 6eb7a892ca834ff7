// Divergence, statistics and gradient of supervised rows whose logits exist.
//
//   in   student, teacher: R gathered rows of V logits, fp32 / fp16 / bf16; or pairs of fp16 from linear_hopper.h
//   out  eight numbers a row, dlogits
// Traffic: resident 2 V reads + V writes a row (the floor); two-pass 4 V reads (the second mostly from L2) + V writes.
// Rows of either KL take two visits, vector by vector: statistics, gradient. JSD and clipped entries take three, the
// last two entry by entry (consecutive threads, consecutive entries): one copy of their long code keeps the registers
// of the common case. The blocks of a cluster exchange their statistics, 36 bytes, through distributed shared memory.
// Resident rows come by bulk copies, part by part, and the next row's while this one is merged and written: see
// RowRing. No atomics: bitwise repeatable. Numbers and their errors: ../numerics.h.
#pragma once

#include <type_traits>

#include "row_reader.cuh"

namespace vigos {

#if defined(__CUDACC__) || defined(VIGOS_EMULATED)

__device__ __forceinline__ RowStats shuffled(const RowStats& x, int mask) {
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

// Merges over `lanes` lanes, a power of two: warps and ranks are at most 16, which takes four rounds. Lane 0's result
// counts.
__device__ __forceinline__ RowStats warp_merge(RowStats x, int lanes, bool reverse) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) merge(x, shuffled(x, mask), reverse);
  return x;
}

__device__ __forceinline__ SecondSums warp_sum(SecondSums x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    x.divergence += device::shuffle_xor(x.divergence, mask);
    x.mean_slope += device::shuffle_xor(x.mean_slope, mask);
  }
  return x;
}

// Adds N vectors of both sides, loaded before the first of them is used: one look at the maxima for all of them.
template <int N, typename Reader>
__device__ __forceinline__ void add_vectors(RowStats& stats, float& shift, float& shift_t, const Reader& reader,
                                            int index, bool reverse) {
  typename Reader::Vector s[N];
  typename Reader::TeacherVector t[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    s[u] = reader.read_student(index + u * kRowThreads);
    t[u] = reader.read_teacher(index, u * kRowThreads);
  }
  const float octaves = reader.unit() * kLog2E;
  Logits x[N][Reader::kVec];
  float max_s = -INFINITY, max_t = -INFINITY;
#pragma unroll
  for (int u = 0; u < N; ++u) {
#pragma unroll
    for (int j = 0; j < Reader::kVec; ++j) {
      x[u][j] = reader.pair(s[u].value[j], t[u].value[j], (index + u * kRowThreads) * Reader::kVec + j);
      max_s = fmaxf(max_s, x[u][j].x_s);
    }
    max_t = fmaxf(max_t, reader.teacher_bound(t[u], x[u]));
  }
  if (!covers(stats, max_s * octaves, max_t * octaves)) {
    raise(stats, max_s * octaves, max_t * octaves, reverse);
    shift = stats.shift();
    shift_t = stats.shift_t();
  }
#pragma unroll
  for (int u = 0; u < N; ++u) {
#pragma unroll
    for (int j = 0; j < Reader::kVec; ++j) add(stats, x[u][j], reader.unit(), shift, shift_t, reverse);
  }
}

// What a thread knows of a row so far, and the shifts that its exponents take.
struct Running {
  RowStats stats;
  float shift = 0.0f, shift_t = 0.0f;
};

// A thread's share of the first visit to a part of a row: maxima, sums, moments, gap. TILE: the part has at most
// kLoadsInFlight vectors a thread.
template <bool TILE, typename Reader>
__device__ __forceinline__ void first_visit(Running& row, const Reader& reader, int thread, bool reverse) {
  const int full = reader.full_vectors();
  int index = thread;
  if constexpr (TILE && Reader::kInFlight == Reader::kTileLoads) {
    if (index + (Reader::kTileLoads - 1) * kRowThreads < full) {
      add_vectors<Reader::kTileLoads>(row.stats, row.shift, row.shift_t, reader, index, reverse);
    } else {
      constexpr int kFew = Reader::kTileLoads / 2;
#pragma unroll 1
      for (; index + (kFew - 1) * kRowThreads < full; index += kRowThreads * kFew) {
        add_vectors<kFew>(row.stats, row.shift, row.shift_t, reader, index, reverse);
      }
      if (kFew > 1 && index < full) add_vectors<1>(row.stats, row.shift, row.shift_t, reader, index, reverse);
    }
  } else {
#pragma unroll 1
    for (; index + (Reader::kInFlight - 1) * kRowThreads < full; index += kRowThreads * Reader::kInFlight) {
      add_vectors<Reader::kInFlight>(row.stats, row.shift, row.shift_t, reader, index, reverse);
    }
#pragma unroll 1
    for (; index < full; index += kRowThreads) {
      add_vectors<1>(row.stats, row.shift, row.shift_t, reader, index, reverse);
    }
  }
  if (full == reader.count) return;
#pragma unroll 1
  for (int i = full * Reader::kVec + thread; i < reader.entries(); i += kRowThreads) {
    if (!reader.live_entry(i)) break;
    const Logits x = reader.pair(reader.student_entry(i), reader.teacher_entry(i), i);
    const float octaves = reader.unit() * kLog2E;
    raise(row.stats, x.x_s * octaves, x.x_t * octaves, reverse);
    row.shift = row.stats.shift();
    row.shift_t = row.stats.shift_t();
    add(row.stats, x, reader.unit(), row.shift, row.shift_t, reverse);
  }
}

// Writes the gradients of N vectors of a row of either KL. weight: of the row.
template <int N, bool REVERSE, int STEP, typename G, typename Reader>
__device__ __forceinline__ void write_vectors(G* out, const Reader& reader, const Row& row, int index, float weight) {
  typename Reader::Vector s[N];
  typename Reader::TeacherVector t[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    s[u] = reader.read_student(index + u * STEP);
    t[u] = reader.read_teacher(index, u * STEP);
  }
#pragma unroll
  for (int u = 0; u < N; ++u) {
    Pack<G, Reader::kVec> g;
#pragma unroll
    for (int j = 0; j < Reader::kVec; ++j) {
      const int i = (index + u * STEP) * Reader::kVec + j;
      const Entry e = entry_of(row, reader.pair(s[u].value[j], t[u].value[j], i));
      g.value[j] = G(weight * reader.slope(s[u].value[j], i) * gradient_kl<REVERSE>(row, e));
    }
    *reinterpret_cast<Pack<G, Reader::kVec>*>(out + (reader.first + index + u * STEP) * Reader::kVec) = g;
  }
}

template <bool REVERSE, int THREADS, bool TILE, typename G, typename Reader>
__device__ __forceinline__ void write_whole(G* out, const Reader& reader, const Row& row, int thread, float weight) {
  const int full = reader.full_vectors();
  int index = thread;
  if constexpr (TILE && Reader::kInFlight == Reader::kTileLoads) {
    if (index + (Reader::kTileLoads - 1) * THREADS < full) {
      write_vectors<Reader::kTileLoads, REVERSE, THREADS>(out, reader, row, index, weight);
    } else {
      constexpr int kFew = Reader::kTileLoads / 2;
#pragma unroll 1
      for (; index + (kFew - 1) * THREADS < full; index += THREADS * kFew) {
        write_vectors<kFew, REVERSE, THREADS>(out, reader, row, index, weight);
      }
      if (kFew > 1 && index < full) write_vectors<1, REVERSE, THREADS>(out, reader, row, index, weight);
    }
  } else {
#pragma unroll 1
    for (; index + (Reader::kInFlight - 1) * THREADS < full; index += THREADS * Reader::kInFlight) {
      write_vectors<Reader::kInFlight, REVERSE, THREADS>(out, reader, row, index, weight);
    }
#pragma unroll 1
    for (; index < full; index += THREADS) write_vectors<1, REVERSE, THREADS>(out, reader, row, index, weight);
  }
}

// Writes the gradient of a part. weight: of the row; 0 where it is clipped, which may hold inf: never 0 * inf.
template <bool TILE, typename G, typename Reader>
__device__ __forceinline__ void write_part(G* out, const Reader& reader, const Row& row, int thread, float weight) {
  int begin = 0;  // of the entries that are left
  if (!row.second() && weight != 0.0f) {
    if (row.kind == kReverseKL) {
      write_whole<true, kRowThreads, TILE>(out, reader, row, thread, weight);
    } else {
      write_whole<false, kRowThreads, TILE>(out, reader, row, thread, weight);
    }
    begin = reader.full_vectors() * Reader::kVec;
    if (begin == reader.count * Reader::kVec) return;
  }
#pragma unroll 1
  for (int i = begin + thread; i < reader.entries(); i += kRowThreads) {
    float value = 0.0f;
    if (weight != 0.0f && reader.live_entry(i)) {
      const auto s = reader.student_entry(i);
      const Entry e = entry_of(row, reader.pair(s, reader.teacher_entry(i), i));
      value = weight * reader.slope(s, i) * gradient(row, e);
    }
    out[reader.first * Reader::kVec + i] = G(value);
  }
}

template <typename Reader, typename G, bool RESIDENT>
__device__ __forceinline__ void logits_rows_body(const typename Reader::Params& p, const RowLayout& layout) {
  const int thread = device::thread_index(), lane = thread % 32, warp = thread / 32;
  RowShared& shared = *reinterpret_cast<RowShared*>(device::shared_memory());
  std::conditional_t<RESIDENT, RowRing<Reader>, Passing<Reader>> rows(p, layout, shared);

#pragma unroll 1
  for (; rows.row < p.rows; rows.next()) {
    const int64_t r = rows.row;
    const Kind kind = static_cast<Kind>(p.kind[r]);
    const bool reverse = kind == kReverseKL, reporter = rows.rank == 0 && thread == 0;
    const Reader entire = Reader::entire(p, r);
    Logits label = {};
    if (reporter && p.labels) {  // before the gradient can overwrite the logit
      const int id = static_cast<int>(p.labels[r]);
      label = entire.pair(entire.student_entry(id), entire.teacher_entry(id), id);
    }

    Running running;
#pragma unroll 1
    for (int i = 0; i < rows.parts; ++i) first_visit<RESIDENT>(running, rows.take(entire, i), thread, reverse);
    RowStats stats = warp_merge(running.stats, 32, reverse);
    if (lane == 0) shared.warp[warp] = stats;
    device::block_sync();
    if (warp == 0) {
      stats = warp_merge(lane < kRowWarps ? shared.warp[lane] : RowStats{}, 16, reverse);
      if (lane == 0) shared.block[rows.turn] = stats;
    }
    if constexpr (RESIDENT) {
      device::cluster_sync();
      if (warp == 0) {
        stats = lane < rows.ranks ? *device::cluster_map(&shared.block[rows.turn], lane) : RowStats{};
        stats = warp_merge(stats, kMaxCluster, reverse);
      }
    }
    if (thread == 0) shared.row = finish(stats, kind, p.share, p.entry_clip, entire.unit());
    device::block_sync();
    Row row = shared.row;

    // Second visit, for rows whose terms need the normalisers first.
    if (row.second()) {
      SecondSums sums;
#pragma unroll 1
      for (int part = 0; part < rows.parts; ++part) {
        const Reader reader = rows.again(entire, part);
#pragma unroll 1
        for (int i = thread; i < reader.entries(); i += kRowThreads) {
          if (!reader.live_entry(i)) continue;
          add_second(sums, row, entry_of(row, reader.pair(reader.student_entry(i), reader.teacher_entry(i), i)));
        }
      }
      sums = warp_sum(sums, 32);
      if (lane == 0) shared.warp_second[warp] = sums;
      device::block_sync();
      if (warp == 0) {
        sums = warp_sum(lane < kRowWarps ? shared.warp_second[lane] : SecondSums{}, 32);
        if (lane == 0) shared.block_second = sums;
      }
      if constexpr (RESIDENT) {
        device::cluster_sync();
        if (warp == 0) {
          sums = lane < rows.ranks ? *device::cluster_map(&shared.block_second, lane) : SecondSums{};
          sums = warp_sum(sums, 32);
        }
      }
      if (thread == 0) shared.row.sums = sums;
      device::block_sync();
      row.sums = shared.row.sums;
    }

    const float divergence = row.divergence();
    const bool clipped = divergence > p.clip[r];
    if (reporter) {
      p.divergence[r] = divergence;
      p.clipped[r] = clipped;
      p.student_entropy[r] = stats.entropy_s();
      p.teacher_entropy[r] = stats.entropy_t();
      p.student_lse[r] = stats.lse_s();
      p.teacher_lse[r] = stats.lse_t();
      if (p.state) save(row, p.state + r * State::kColumns);
      if (p.labels) {
        p.student_logprob[r] = (fmaf(label.x_s, row.octaves(), -stats.shift()) - log2f(stats.sum_s)) * kLn2;
        p.teacher_logprob[r] = (fmaf(label.x_t, row.octaves(), -stats.shift_t()) - log2f(stats.sum_t)) * kLn2;
      }
    }

    // Last visit: the gradient.
    const float weight = clipped ? 0.0f : p.weight[r];
    G* out = static_cast<G*>(p.dlogits) + (p.dlogits_row ? p.dlogits_row[r] : r) * p.stride_dlogits;
#pragma unroll 1
    for (int part = 0; part < rows.parts; ++part) {
      if (p.dlogits) write_part<RESIDENT>(out, rows.again(entire, part), row, thread, weight);
      rows.release(part);
    }
  }
  if constexpr (RESIDENT) device::cluster_sync();  // shared memory must outlive the other blocks' reads of it
}

// Row n of the student's logits: the sum over its supervised rows, each from its saved state. A thread reads all of an
// entry, or of a vector of entries, before it writes it, and shares nothing: `dlogits` may be the student's logits.
template <typename T, bool ALIGNED, bool TRANSFORMED>
__device__ __forceinline__ void logits_gradient_body(const LogitsGradientParams& p, int blocks_per_row) {
  using Reader = RowReader<LogitsGradientParams, T, ALIGNED, TRANSFORMED>;
  using Vector = typename Reader::Vector;
  constexpr int kVec = Reader::kVec;

  const int64_t n = device::block_index() / blocks_per_row;
  const int first = static_cast<int>(device::block_index() % blocks_per_row) * kGradientVectors;
  const int64_t vectors = (p.vocab + kVec - 1) / kVec;
  const int count = static_cast<int>(vectors - first < kGradientVectors ? vectors - first : kGradientVectors);
  const int thread = device::thread_index();
  T* out = static_cast<T*>(p.dlogits) + n * p.stride_dlogits;
  const int64_t begin = p.offsets[n], end = p.offsets[n + 1];
  if (p.kept) {
    bool same = true;
    for (int64_t k = begin; k < end; ++k) same &= p.row_grad[p.order[k]] == p.kept[p.order[k]];
    if (same) return;
  }

  const auto part = [first](const void* logits, int64_t offset) {
    return reinterpret_cast<const Vector*>(static_cast<const T*>(logits) + offset) + first;
  };
  Reader reader{p, part(p.student, n * p.stride_student), nullptr, first, count};
  const auto row_of = [&](int64_t r) {
    reader.teacher = part(p.teacher, p.teacher_row[r] * p.stride_teacher);
    return restore(p.state + r * State::kColumns, static_cast<Kind>(p.kind[r]), p.share, p.entry_clip, reader.unit());
  };
  int done = 0;
  if (end - begin == 1) {
    const int64_t r = p.order[begin];
    const float row_grad = p.row_grad[r];
    const Row row = row_of(r);
    if (!row.second() && row_grad != 0.0f) {
      if (row.kind == kReverseKL) {
        write_whole<true, kGradientThreads, false>(out, reader, row, thread, row_grad);
      } else {
        write_whole<false, kGradientThreads, false>(out, reader, row, thread, row_grad);
      }
      done = reader.full_vectors() * kVec;
    }
  }
  // What is left, entry by entry. A row whose row_grad is 0 is left out: it may hold inf.
#pragma unroll 1
  for (int i = done + thread; i < reader.entries(); i += kGradientThreads) {
    float sum = 0.0f;
    if (reader.live_entry(i)) {
      const T s = reader.student_entry(i);
#pragma unroll 1
      for (int64_t k = begin; k < end; ++k) {
        const int64_t r = p.order[k];
        if (p.row_grad[r] == 0.0f) continue;
        const Row row = row_of(r);
        sum += p.row_grad[r] * gradient(row, entry_of(row, reader.pair(s, reader.teacher_entry(i), i)));
      }
      sum *= reader.slope(s, i);
    }
    out[first * kVec + i] = T(sum);
  }
}

#endif  // a compiler for kernels

}  // namespace vigos
