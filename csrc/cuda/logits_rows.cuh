// Divergence, statistics and gradient of supervised rows whose logits exist.
//
//   in   student, teacher: R gathered rows of V logits, fp32 / fp16 / bf16       out  eight numbers a row, dlogits
// Traffic: resident 2 V reads + V writes a row (the floor); two-pass 4 V reads (the second mostly from L2) + V writes.
// Rows of either KL take two visits, vector by vector: statistics, gradient. JSD and clipped entries take three, the
// last two entry by entry (consecutive threads, consecutive entries): one copy of their long code keeps the registers
// of the common case. The blocks of a cluster exchange their statistics, 36 bytes, through distributed shared memory.
// No atomics: bitwise repeatable. Numbers and their errors: ../numerics.h.
#pragma once

#include <cstring>

#include "logits_rows.h"
#if defined(__CUDACC__)
#include "device.cuh"
#endif

namespace vigos {

constexpr int kRowThreads = 384;  // two blocks a multiprocessor leave 80 registers: no spills
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kPortableCluster = 8, kMaxCluster = 16;  // every GPU with clusters takes the first
constexpr int kLoadsInFlight = 2;                      // 16-byte loads a thread and side, before the first use
constexpr int kVectorBytes = 16;
constexpr int kGradientThreads = 256;
constexpr int kGradientVectors = 4 * kGradientThreads;  // of a row, a block

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T value[N];
};

// Static part of a block's shared memory, placed at the start of the dynamic allocation.
struct alignas(16) RowShared {
  RowStats warp[kRowWarps];
  RowStats block;  // read by the other blocks of the cluster
  SecondSums warp_second[kRowWarps];
  SecondSums block_second;  // read by the other blocks of the cluster
  Row row;
};

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

// A block's slice of a pair's two rows: where its entries lie, how they are read again, and what logits they stand for.
// The kernels know rows through such a reader alone: one whose `pair` and `slope` say something else may take its
// place.
template <typename P, typename T, bool ALIGNED, bool TRANSFORMED, bool RESIDENT>
struct RowReader {
  using Params = P;
  using Item = T;
  static constexpr int kVec = ALIGNED ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;
  static constexpr bool kResident = RESIDENT;
  static constexpr int kInFlight = TRANSFORMED ? 1 : kLoadsInFlight;  // the general transform needs the registers
  using Vector = Pack<T, kVec>;

  const P& p;
  const T* student;
  const T* teacher;
  Vector* kept_student;  // this block's slice in shared memory
  Vector* kept_teacher;
  int64_t first;  // the slice's first vector in the row
  int count;      // vectors in the slice

  // Pair r, of whose vectors this block of the cluster has `slice` at most; `kept`: room for them on both sides.
  static __device__ __forceinline__ RowReader slice_of(const P& p, int64_t r, int rank, int64_t slice, Vector* kept) {
    const int64_t student_row = p.student_row ? p.student_row[r] : r,
                  teacher_row = p.teacher_row ? p.teacher_row[r] : r;
    const int64_t first = rank * slice, left = (p.vocab + kVec - 1) / kVec - first;
    return {p,
            static_cast<const T*>(p.student) + student_row * p.stride_student,
            static_cast<const T*>(p.teacher) + teacher_row * p.stride_teacher,
            kept,
            kept + slice,
            first,
            static_cast<int>(left < slice ? (left > 0 ? left : 0) : slice)};
  }

  // Vectors whose entries are all real: nothing is asked about one of them, and loads need no branch between them.
  __device__ __forceinline__ int full_vectors() const {
    const int64_t left = p.logical_vocab / kVec - first;
    return static_cast<int>(left < count ? (left > 0 ? left : 0) : count);
  }
  __device__ __forceinline__ Vector read(const T* row, int index) const {
    const int64_t column = (first + index) * kVec;
    Vector v;
    if constexpr (ALIGNED) {
      const uint4 raw = device::load(reinterpret_cast<const uint4*>(row + column), RESIDENT);
      memcpy(&v, &raw, sizeof v);
    } else {
      v.value[0] = row[column];
    }
    return v;
  }
  __device__ __forceinline__ Vector again(const T* row, const Vector* kept, int index) const {
    if constexpr (RESIDENT) return kept[index];
    return read(row, index);
  }
  __device__ __forceinline__ Vector student_again(int index) const { return again(student, kept_student, index); }
  __device__ __forceinline__ Vector teacher_again(int index) const { return again(teacher, kept_teacher, index); }

  // The slice entry by entry.
  __device__ __forceinline__ int entries() const {
    const int64_t left = p.vocab - first * kVec, all = static_cast<int64_t>(count) * kVec;
    return static_cast<int>(left < all ? (left > 0 ? left : 0) : all);
  }
  __device__ __forceinline__ T entry(const T* row, const Vector* kept, int i) const {
    if constexpr (RESIDENT) return reinterpret_cast<const T*>(kept)[i];
    return row[first * kVec + i];
  }
  __device__ __forceinline__ T student_entry(int i) const { return entry(student, kept_student, i); }
  __device__ __forceinline__ T teacher_entry(int i) const { return entry(teacher, kept_teacher, i); }
  __device__ __forceinline__ bool live_entry(int i) const { return first * kVec + i < p.logical_vocab; }

  // i: the entry's place in the slice.
  __device__ __forceinline__ float bias(const float* biases, int i) const {
    return biases ? biases[first * kVec + i] : 0.0f;
  }
  __device__ __forceinline__ Logits pair(T raw_s, T raw_t, int i) const {
    const float x_s = static_cast<float>(raw_s), x_t = static_cast<float>(raw_t);
    if constexpr (!TRANSFORMED) return raw_pair(x_s, x_t);
    return transformed_pair(x_s, bias(p.student_bias, i), x_t, bias(p.teacher_bias, i), p.student_transform,
                            p.teacher_transform, p.alike);
  }
  __device__ __forceinline__ float unit() const { return TRANSFORMED ? 1.0f : p.student_transform.alpha; }
  __device__ __forceinline__ float slope(T raw, int i) const {
    if constexpr (!TRANSFORMED) return p.student_transform.alpha;
    return transform_slope(static_cast<float>(raw), bias(p.student_bias, i), p.student_transform);
  }
};

// Adds N vectors of both sides, loaded before the first of them is used: one look at the maxima for all of them.
template <int N, typename Reader>
__device__ __forceinline__ void add_vectors(RowStats& stats, float& shift, float& shift_t, const Reader& reader,
                                            int index, bool reverse) {
  typename Reader::Vector s[N], t[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    s[u] = reader.read(reader.student, index + u * kRowThreads);
    t[u] = reader.read(reader.teacher, index + u * kRowThreads);
  }
  const float octaves = reader.unit() * kLog2E;
  Logits x[N][Reader::kVec];
  float max_s = -INFINITY, max_t = -INFINITY;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if constexpr (Reader::kResident) {
      reader.kept_student[index + u * kRowThreads] = s[u];
      reader.kept_teacher[index + u * kRowThreads] = t[u];
    }
#pragma unroll
    for (int j = 0; j < Reader::kVec; ++j) {
      x[u][j] = reader.pair(s[u].value[j], t[u].value[j], (index + u * kRowThreads) * Reader::kVec + j);
      max_s = fmaxf(max_s, x[u][j].x_s);
      max_t = fmaxf(max_t, x[u][j].x_t);
    }
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

// The first visit of a thread to its part of the row: maxima, sums, moments, gap.
template <typename Reader>
__device__ __forceinline__ RowStats first_visit(const Reader& reader, int thread, bool reverse) {
  RowStats stats;
  float shift = 0.0f, shift_t = 0.0f;
  const int full = reader.full_vectors();
  int index = thread;
#pragma unroll 1
  for (; index + (Reader::kInFlight - 1) * kRowThreads < full; index += kRowThreads * Reader::kInFlight) {
    add_vectors<Reader::kInFlight>(stats, shift, shift_t, reader, index, reverse);
  }
  if (index < full) add_vectors<1>(stats, shift, shift_t, reader, index, reverse);  // of at most two in flight
#pragma unroll 1
  for (int i = full * Reader::kVec + thread; i < reader.entries(); i += kRowThreads) {
    if (!reader.live_entry(i)) break;
    const auto s = reader.student[reader.first * Reader::kVec + i], t = reader.teacher[reader.first * Reader::kVec + i];
    if constexpr (Reader::kResident) {
      reader.kept_student[i / Reader::kVec].value[i % Reader::kVec] = s;
      reader.kept_teacher[i / Reader::kVec].value[i % Reader::kVec] = t;
    }
    const Logits x = reader.pair(s, t, i);
    const float octaves = reader.unit() * kLog2E;
    raise(stats, x.x_s * octaves, x.x_t * octaves, reverse);
    add(stats, x, reader.unit(), stats.shift(), stats.shift_t(), reverse);
  }
  return stats;
}

// Writes the gradients of N vectors of a row of either KL. weight: of the row.
template <int N, bool REVERSE, int STEP, typename G, typename Reader>
__device__ __forceinline__ void write_vectors(G* out, const Reader& reader, const Row& row, int index, float weight) {
  typename Reader::Vector s[N], t[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    s[u] = reader.student_again(index + u * STEP);
    t[u] = reader.teacher_again(index + u * STEP);
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

template <bool REVERSE, int THREADS, typename G, typename Reader>
__device__ __forceinline__ void write_whole(G* out, const Reader& reader, const Row& row, int thread, float weight) {
  const int full = reader.full_vectors();
  int index = thread;
#pragma unroll 1
  for (; index + (Reader::kInFlight - 1) * THREADS < full; index += THREADS * Reader::kInFlight) {
    write_vectors<Reader::kInFlight, REVERSE, THREADS>(out, reader, row, index, weight);
  }
  if (index < full) write_vectors<1, REVERSE, THREADS>(out, reader, row, index, weight);
}

template <typename Reader, typename G>
__device__ __forceinline__ void logits_rows_body(const typename Reader::Params& p) {
  using T = typename Reader::Item;
  constexpr bool RESIDENT = Reader::kResident;
  constexpr int kVec = Reader::kVec;

  const int ranks = RESIDENT ? device::cluster_size() : 1;
  const int rank = RESIDENT ? device::cluster_rank() : 0;
  const int64_t r = device::block_index() / ranks;
  const int thread = device::thread_index(), lane = thread % 32, warp = thread / 32;

  RowShared& shared = *reinterpret_cast<RowShared*>(device::shared_memory());
  const Kind kind = static_cast<Kind>(p.kind[r]);
  const bool reverse = kind == kReverseKL;
  const int64_t slice = ((p.vocab + kVec - 1) / kVec + ranks - 1) / ranks, first = rank * slice;
  auto* const kept = reinterpret_cast<typename Reader::Vector*>(device::shared_memory() + sizeof(RowShared));
  const Reader reader = Reader::slice_of(p, r, rank, slice, kept);

  const bool reporter = rank == 0 && thread == 0;
  Logits label = {};
  if (reporter && p.labels) {  // before the gradient can overwrite the logit
    label = reader.pair(reader.student[p.labels[r]], reader.teacher[p.labels[r]], static_cast<int>(p.labels[r]));
  }

  RowStats stats = first_visit(reader, thread, reverse);
  stats = warp_merge(stats, 32, reverse);
  if (lane == 0) shared.warp[warp] = stats;
  device::block_sync();
  if (warp == 0) {
    stats = warp_merge(lane < kRowWarps ? shared.warp[lane] : RowStats{}, 16, reverse);
    if (lane == 0) shared.block = stats;
  }
  if constexpr (RESIDENT) {
    device::cluster_sync();
    if (warp == 0) {
      stats = lane < ranks ? *device::cluster_map(&shared.block, lane) : RowStats{};
      stats = warp_merge(stats, kMaxCluster, reverse);
    }
  }
  if (thread == 0) shared.row = finish(stats, kind, p.share, p.entry_clip, reader.unit());
  device::block_sync();
  Row row = shared.row;

  // Second visit, for rows whose terms need the normalisers first.
  if (row.second()) {
    SecondSums sums;
#pragma unroll 1
    for (int i = thread; i < reader.entries(); i += kRowThreads) {
      if (!reader.live_entry(i)) continue;
      add_second(sums, row, entry_of(row, reader.pair(reader.student_entry(i), reader.teacher_entry(i), i)));
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
        sums = lane < ranks ? *device::cluster_map(&shared.block_second, lane) : SecondSums{};
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

  // Last visit: the gradient. A clipped row may hold inf: its gradient is written as 0, never as 0 * inf.
  if (p.dlogits) {
    const float weight = clipped ? 0.0f : p.weight[r];
    G* out = static_cast<G*>(p.dlogits) + (p.dlogits_row ? p.dlogits_row[r] : r) * p.stride_dlogits;
    int begin = 0;  // of the entries that are left
    if (!row.second() && weight != 0.0f) {
      if (reverse) {
        write_whole<true, kRowThreads>(out, reader, row, thread, weight);
      } else {
        write_whole<false, kRowThreads>(out, reader, row, thread, weight);
      }
      begin = reader.full_vectors() * kVec;
    }
#pragma unroll 1
    for (int i = begin + thread; i < reader.entries(); i += kRowThreads) {
      float value = 0.0f;
      if (weight != 0.0f && reader.live_entry(i)) {
        const T s = reader.student_entry(i);
        const Entry e = entry_of(row, reader.pair(s, reader.teacher_entry(i), i));
        value = weight * reader.slope(s, i) * gradient(row, e);
      }
      out[first * kVec + i] = G(value);
    }
  }
  if constexpr (RESIDENT) device::cluster_sync();  // shared memory must outlive the other blocks' reads of it
}

// Row n of the student's logits: the sum over its supervised rows, each from its saved state. A thread reads all of an
// entry, or of a vector of entries, before it writes it, and shares nothing: `dlogits` may be the student's logits.
template <typename T, bool ALIGNED, bool TRANSFORMED>
__device__ __forceinline__ void logits_gradient_body(const LogitsGradientParams& p, int blocks_per_row) {
  using Reader = RowReader<LogitsGradientParams, T, ALIGNED, TRANSFORMED, false>;
  constexpr int kVec = Reader::kVec;

  const int64_t n = device::block_index() / blocks_per_row;
  const int64_t first = device::block_index() % blocks_per_row * kGradientVectors;
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

  Reader reader{p, static_cast<const T*>(p.student) + n * p.stride_student, nullptr, nullptr, nullptr, first, count};
  const auto row_of = [&](int64_t r) {
    reader.teacher = static_cast<const T*>(p.teacher) + p.teacher_row[r] * p.stride_teacher;
    return restore(p.state + r * State::kColumns, static_cast<Kind>(p.kind[r]), p.share, p.entry_clip, reader.unit());
  };
  int done = 0;
  if (end - begin == 1) {
    const int64_t r = p.order[begin];
    const float row_grad = p.row_grad[r];
    const Row row = row_of(r);
    if (!row.second() && row_grad != 0.0f) {
      if (row.kind == kReverseKL) {
        write_whole<true, kGradientThreads>(out, reader, row, thread, row_grad);
      } else {
        write_whole<false, kGradientThreads>(out, reader, row, thread, row_grad);
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
