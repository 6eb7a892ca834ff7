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
constexpr int kMaxCluster = 8;     // the largest portable size
constexpr int kLoadsInFlight = 2;  // 16-byte loads a thread and side, before the first use
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

// Merges over `lanes` lanes, a power of two. Lane 0's result counts.
template <bool FAST>
__device__ __forceinline__ RowStats warp_merge(RowStats x, int lanes, bool reverse) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) merge<FAST>(x, shuffled(x, mask), reverse);
  return x;
}

__device__ __forceinline__ SecondSums warp_sum(SecondSums x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    x.divergence += device::shuffle_xor(x.divergence, mask);
    x.mean_slope += device::shuffle_xor(x.mean_slope, mask);
  }
  return x;
}

// The row's share of one thread: where its entries lie and how they are read again.
template <typename P, typename T, bool ALIGNED, bool TRANSFORMED, bool RESIDENT>
struct RowReader {
  static constexpr int kVec = ALIGNED ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;
  using Vector = Pack<T, kVec>;

  const P& p;
  const T* student;
  const T* teacher;
  Vector* kept_student;  // this block's slice in shared memory
  Vector* kept_teacher;
  int64_t first;  // the slice's first vector in the row
  int count;      // vectors in the slice

  __device__ __forceinline__ Vector read(const T* row, int index) const {
    const int64_t column = (first + index) * kVec;
    Vector v;
    if constexpr (ALIGNED) {
      if (column + kVec <= p.vocab) {
        const uint4 raw = device::load(reinterpret_cast<const uint4*>(row + column), RESIDENT);
        memcpy(&v, &raw, sizeof v);
        return v;
      }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) v.value[j] = column + j < p.vocab ? row[column + j] : T(0.0f);
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

  // Entries of vector `index` inside the logical vocabulary.
  __device__ __forceinline__ int live(int index) const {
    const int64_t left = p.logical_vocab - (first + index) * kVec;
    return left >= kVec ? kVec : (left > 0 ? static_cast<int>(left) : 0);
  }
  __device__ __forceinline__ bool live_entry(int i) const { return first * kVec + i < p.logical_vocab; }

  // i: the entry's place in the slice.
  __device__ __forceinline__ float bias(const float* biases, int i) const {
    return biases ? biases[first * kVec + i] : 0.0f;
  }
  __device__ __forceinline__ float z(T raw, const float* bias_of, const Transform& f, int i) const {
    const float x = static_cast<float>(raw);
    if constexpr (!TRANSFORMED) return x * f.alpha;
    return transformed(x, bias(bias_of, i), f);
  }
  __device__ __forceinline__ float z_student(T raw, int i) const {
    return z(raw, p.student_bias, p.student_transform, i);
  }
  __device__ __forceinline__ float z_teacher(T raw, int i) const {
    return z(raw, p.teacher_bias, p.teacher_transform, i);
  }
  __device__ __forceinline__ Logits pair(T raw_s, T raw_t, int i) const {
    const float x_s = static_cast<float>(raw_s), x_t = static_cast<float>(raw_t);
    if constexpr (!TRANSFORMED) return scaled_pair(x_s, x_t, p.student_transform.alpha);
    return transformed_pair(x_s, bias(p.student_bias, i), x_t, bias(p.teacher_bias, i), p.student_transform,
                            p.teacher_transform, p.alike);
  }
  __device__ __forceinline__ float slope(T raw, int i) const {
    if constexpr (!TRANSFORMED) return p.student_transform.alpha;
    return transform_slope(static_cast<float>(raw), bias(p.student_bias, i), p.student_transform);
  }
};

template <typename G, int N>
__device__ __forceinline__ void write(G* row, const Pack<G, N>& g, int64_t column, int64_t vocab) {
  if (column + N <= vocab) {
    *reinterpret_cast<Pack<G, N>*>(row + column) = g;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (column + j < vocab) row[column + j] = g.value[j];
    }
  }
}

template <typename T, typename G, bool ALIGNED, bool TRANSFORMED, bool RESIDENT>
__device__ __forceinline__ void logits_rows_body(const LogitsRowsParams& p) {
  constexpr bool FAST = sizeof(G) == 2;
  using Reader = RowReader<LogitsRowsParams, T, ALIGNED, TRANSFORMED, RESIDENT>;
  using Vector = typename Reader::Vector;
  constexpr int kVec = Reader::kVec;

  const int ranks = RESIDENT ? device::cluster_size() : 1;
  const int rank = RESIDENT ? device::cluster_rank() : 0;
  const int64_t r = device::block_index() / ranks;
  const int thread = device::thread_index(), lane = thread % 32, warp = thread / 32;

  RowShared& shared = *reinterpret_cast<RowShared*>(device::shared_memory());
  const int64_t student_row = p.student_row ? p.student_row[r] : r;
  const int64_t teacher_row = p.teacher_row ? p.teacher_row[r] : r;
  const Kind kind = static_cast<Kind>(p.kind[r]);
  const bool reverse = kind == kReverseKL;

  const int64_t vectors = (p.vocab + kVec - 1) / kVec;
  const int64_t slice = (vectors + ranks - 1) / ranks;
  const int64_t first = rank * slice;
  const int64_t mine = vectors - first < slice ? vectors - first : slice;
  Vector* kept = reinterpret_cast<Vector*>(device::shared_memory() + sizeof(RowShared));
  const Reader reader{p,
                      static_cast<const T*>(p.student) + student_row * p.stride_student,
                      static_cast<const T*>(p.teacher) + teacher_row * p.stride_teacher,
                      kept,
                      kept + slice,
                      first,
                      mine > 0 ? static_cast<int>(mine) : 0};

  const bool reporter = rank == 0 && thread == 0;
  float label_s = 0.0f, label_t = 0.0f;
  if (reporter && p.labels) {  // before the gradient can overwrite the logit
    const int64_t label = p.labels[r];
    const float bias_s = p.student_bias ? p.student_bias[label] : 0.0f;
    const float bias_t = p.teacher_bias ? p.teacher_bias[label] : 0.0f;
    label_s = transformed(static_cast<float>(reader.student[label]), bias_s, p.student_transform);
    label_t = transformed(static_cast<float>(reader.teacher[label]), bias_t, p.teacher_transform);
  }

  // First visit: maxima, sums, moments, gap.
  RowStats stats;
  for (int start = thread; start < reader.count; start += kRowThreads * kLoadsInFlight) {
    Vector s[kLoadsInFlight], t[kLoadsInFlight];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const int index = start + u * kRowThreads;
      if (index < reader.count) {
        s[u] = reader.read(reader.student, index);
        t[u] = reader.read(reader.teacher, index);
      }
    }
    float max_s = -INFINITY, max_t = -INFINITY;
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const int index = start + u * kRowThreads;
      if (index < reader.count) {
        if constexpr (RESIDENT) {
          reader.kept_student[index] = s[u];
          reader.kept_teacher[index] = t[u];
        }
        const int live = reader.live(index);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if (j < live) {
            max_s = fmaxf(max_s, reader.z_student(s[u].value[j], index * kVec + j));
            max_t = fmaxf(max_t, reader.z_teacher(t[u].value[j], index * kVec + j));
          }
        }
      }
    }
    raise<FAST>(stats, max_s, max_t, reverse);
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const int index = start + u * kRowThreads;
      if (index < reader.count) {
        const int live = reader.live(index);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if (j < live) {
            add<FAST>(stats, reader.pair(s[u].value[j], t[u].value[j], index * kVec + j), reverse);
          }
        }
      }
    }
  }

  stats = warp_merge<FAST>(stats, 32, reverse);
  if (lane == 0) shared.warp[warp] = stats;
  device::block_sync();
  if (warp == 0) {
    stats = warp_merge<FAST>(lane < kRowWarps ? shared.warp[lane] : RowStats{}, 32, reverse);
    if (lane == 0) shared.block = stats;
  }
  if constexpr (RESIDENT) {
    device::cluster_sync();
    if (warp == 0) {
      stats = lane < ranks ? *device::cluster_map(&shared.block, lane) : RowStats{};
      stats = warp_merge<FAST>(stats, 32, reverse);
    }
  }
  if (thread == 0) shared.row = finish(stats, kind, p.share, p.entry_clip);
  device::block_sync();
  Row row = shared.row;

  // Second visit, for rows whose terms need the normalisers first.
  if (row.second()) {
    SecondSums sums;
#pragma unroll 1
    for (int i = thread; i < reader.entries(); i += kRowThreads) {
      if (!reader.live_entry(i)) continue;
      add_second(sums, row, entry_of<FAST>(row, reader.pair(reader.student_entry(i), reader.teacher_entry(i), i)));
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
      p.student_logprob[r] = (label_s - stats.shift()) - logf(stats.sum_s);
      p.teacher_logprob[r] = (label_t - stats.shift_t()) - logf(stats.sum_t);
    }
  }

  // Last visit: the gradient. A clipped row may hold inf: its gradient is written as 0, never as 0 * inf.
  if (p.dlogits) {
    const float weight = clipped ? 0.0f : p.weight[r];
    G* out = static_cast<G*>(p.dlogits) + r * p.stride_dlogits;
    if (row.second() && weight != 0.0f) {
#pragma unroll 1
      for (int i = thread; i < reader.entries(); i += kRowThreads) {
        float value = 0.0f;
        if (reader.live_entry(i)) {
          const T s = reader.student_entry(i);
          const Entry e = entry_of<FAST>(row, reader.pair(s, reader.teacher_entry(i), i));
          value = weight * reader.slope(s, i) * gradient_second(row, e);
        }
        out[first * kVec + i] = G(value);
      }
    } else {
      for (int index = thread; index < reader.count; index += kRowThreads) {
        Pack<G, kVec> g;
        const int live = weight == 0.0f ? 0 : reader.live(index);
        const Vector s = reader.student_again(index), t = reader.teacher_again(index);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const int i = index * kVec + j;
          float value = 0.0f;
          if (j < live) {
            const Entry e = entry_of<FAST>(row, reader.pair(s.value[j], t.value[j], i));
            value = weight * reader.slope(s.value[j], i) * gradient_kl(row, e);
          }
          g.value[j] = G(value);
        }
        write<G, kVec>(out, g, (first + index) * kVec, p.vocab);
      }
    }
  }
  if constexpr (RESIDENT) device::cluster_sync();  // shared memory must outlive the other blocks' reads of it
}

// Row n of the student's logits: the sum over its supervised rows, each from its saved state. A thread reads all of an
// entry, or of a vector of entries, before it writes it, and shares nothing: `dlogits` may be the student's logits.
template <typename T, bool ALIGNED, bool TRANSFORMED>
__device__ __forceinline__ void logits_gradient_body(const LogitsGradientParams& p, int blocks_per_row) {
  constexpr bool FAST = sizeof(T) == 2;
  using Reader = RowReader<LogitsGradientParams, T, ALIGNED, TRANSFORMED, false>;
  using Vector = typename Reader::Vector;
  constexpr int kVec = Reader::kVec;

  const int64_t n = device::block_index() / blocks_per_row;
  const int64_t first = device::block_index() % blocks_per_row * kGradientVectors;
  const int64_t vectors = (p.vocab + kVec - 1) / kVec;
  const int count = static_cast<int>(vectors - first < kGradientVectors ? vectors - first : kGradientVectors);
  const Reader reader{p,    static_cast<const T*>(p.student) + n * p.stride_student, nullptr, nullptr, nullptr, first,
                      count};
  T* out = static_cast<T*>(p.dlogits) + n * p.stride_dlogits;
  const int64_t begin = p.offsets[n], end = p.offsets[n + 1];

  const auto row_of = [&](int64_t r) {
    return restore(p.state + r * State::kColumns, static_cast<Kind>(p.kind[r]), p.share, p.entry_clip);
  };
  const auto teacher_of = [&](int64_t r) {
    return static_cast<const T*>(p.teacher) + p.teacher_row[r] * p.stride_teacher;
  };
  bool second = false;
  for (int64_t i = begin; i < end; ++i) second |= row_of(p.order[i]).second();

  // A row whose row_grad is 0 is left out: it may hold inf.
  if (second) {
#pragma unroll 1
    for (int i = device::thread_index(); i < reader.entries(); i += kGradientThreads) {
      float sum = 0.0f;
      const T s = reader.student_entry(i);
      if (reader.live_entry(i)) {
#pragma unroll 1
        for (int64_t k = begin; k < end; ++k) {
          const int64_t r = p.order[k];
          if (p.row_grad[r] == 0.0f) continue;
          const Row row = row_of(r);
          const Entry e = entry_of<FAST>(row, reader.pair(s, teacher_of(r)[first * kVec + i], i));
          sum += p.row_grad[r] * gradient(row, e);
        }
        sum *= reader.slope(s, i);
      }
      out[first * kVec + i] = T(sum);
    }
    return;
  }
  for (int index = device::thread_index(); index < count; index += kGradientThreads) {
    const Vector s = reader.read(reader.student, index);
    const int live = reader.live(index);
    float sum[kVec] = {};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t r = p.order[k];
      const float row_grad = p.row_grad[r];
      if (row_grad == 0.0f) continue;
      const Row row = row_of(r);
      const Vector t = reader.read(teacher_of(r), index);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const int i = index * kVec + j;
        if (j < live) {
          sum[j] += row_grad * gradient_kl(row, entry_of<FAST>(row, reader.pair(s.value[j], t.value[j], i)));
        }
      }
    }
    Vector g;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      g.value[j] = T(j < live ? sum[j] * reader.slope(s.value[j], index * kVec + j) : 0.0f);
    }
    write<T, kVec>(out, g, (first + index) * kVec, p.vocab);
  }
}

#endif  // a compiler for kernels

}  // namespace vigos
