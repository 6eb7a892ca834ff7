// Rows on their way to the kernels of logits_rows.cuh: what a part of a row is, and how its parts come, read twice
// where they lie or once through shared memory.
#pragma once

#include <cstring>

#include "linear_hopper.h"
#include "logits_rows.h"
#if defined(__CUDACC__)
#include "device.cuh"
#include "hopper.cuh"
#endif

namespace vigos {

constexpr int kRowThreads = 384;  // two blocks a multiprocessor leave 80 registers: no spills
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kPortableCluster = 8, kMaxCluster = 16;  // every GPU with clusters takes the first
constexpr int kLoadsInFlight = 2;                      // 16-byte loads a thread and side, before the first use
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = kLoadsInFlight * kRowThreads;  // a side, of a part of a row that is copied at once
constexpr int kMaxSlots = 16;
constexpr int kGradientThreads = 256;
constexpr int kGradientVectors = 4 * kGradientThreads;  // of a row, a block

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T value[N];
};

// Static part of a block's shared memory, placed at the start of the dynamic allocation.
struct alignas(16) RowShared {
  RowStats warp[kRowWarps];
  RowStats block[2];  // read by the other blocks of the cluster, some of which may be a row behind
  SecondSums warp_second[kRowWarps];
  SecondSums block_second;  // read by the other blocks of the cluster
  Row row;
  uint64_t full[kMaxSlots];
};

#if defined(__CUDACC__) || defined(VIGOS_EMULATED)

// A part of a pair's two rows, in device or in shared memory: where its entries lie, and what logits they stand for.
// The kernels know rows through such a reader alone: one whose `pair` and `slope` say something else may take its
// place.
template <typename P, typename T, bool ALIGNED, bool TRANSFORMED>
struct RowReader {
  using Params = P;
  using Item = T;
  static constexpr int kVec = ALIGNED ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;
  static constexpr int kInFlight = TRANSFORMED ? 1 : kLoadsInFlight;  // the general transform needs the registers
  static constexpr int kSides = 2;                                    // that are copied to shared memory
  static constexpr int kTileLoads = kLoadsInFlight;                   // of a thread and side, in a part at most
  using Vector = Pack<T, kVec>;
  using TeacherVector = Vector;

  const P& p;
  const Vector* student;  // of the part
  const Vector* teacher;
  int first, count;  // vectors: the part's first in the row, and how many

  static __device__ __forceinline__ int vectors(const P& p) { return static_cast<int>((p.vocab + kVec - 1) / kVec); }

  // All of pair r.
  static __device__ __forceinline__ RowReader entire(const P& p, int64_t r) {
    const int64_t student_row = p.student_row ? p.student_row[r] : r,
                  teacher_row = p.teacher_row ? p.teacher_row[r] : r;
    return {p, reinterpret_cast<const Vector*>(static_cast<const T*>(p.student) + student_row * p.stride_student),
            reinterpret_cast<const Vector*>(static_cast<const T*>(p.teacher) + teacher_row * p.stride_teacher), 0,
            vectors(p)};
  }
  // Vectors [from, from + size) of a whole row.
  __device__ __forceinline__ RowReader part(int from, int size) const {
    return {p, student + from, teacher + from, from, size};
  }
  // Sends the part to a slot with room for `room` vectors a side; `kept` reads it there.
  __device__ __forceinline__ void send(Vector* slot, int room, uint64_t* barrier) const {
    const int bytes = count * kVectorBytes;
    hopper::barrier_arrive_expect(barrier, kSides * bytes);
    if (bytes == 0) return;
    hopper::copy_bytes(slot, student, bytes, barrier);
    hopper::copy_bytes(slot + room, teacher, bytes, barrier);
  }
  __device__ __forceinline__ RowReader kept(const Vector* slot, int room, int from, int size) const {
    return {p, slot, slot + room, from, size};
  }

  // Vectors whose entries are all real: nothing is asked about one of them, and loads need no branch between them.
  __device__ __forceinline__ int full_vectors() const {
    const int left = static_cast<int>(p.logical_vocab) / kVec - first;
    return left < count ? (left > 0 ? left : 0) : count;
  }
  static __device__ __forceinline__ Vector read(const Vector* address) {
    if constexpr (!ALIGNED) return *address;
    const uint4 raw = device::load(reinterpret_cast<const uint4*>(address));
    Vector v;
    memcpy(&v, &raw, sizeof v);
    return v;
  }
  __device__ __forceinline__ Vector read_student(int index) const { return read(student + index); }
  // Vector `index + step`; the step is known to the compiler.
  __device__ __forceinline__ Vector read_teacher(int index, int step) const { return read(teacher + index + step); }

  // The part entry by entry.
  __device__ __forceinline__ int entries() const {
    const int64_t left = p.vocab - first * kVec, all = static_cast<int64_t>(count) * kVec;
    return static_cast<int>(left < all ? (left > 0 ? left : 0) : all);
  }
  __device__ __forceinline__ T student_entry(int i) const { return reinterpret_cast<const T*>(student)[i]; }
  __device__ __forceinline__ T teacher_entry(int i) const { return reinterpret_cast<const T*>(teacher)[i]; }
  __device__ __forceinline__ bool live_entry(int i) const { return first * kVec + i < p.logical_vocab; }

  // i: the entry's place in the part.
  __device__ __forceinline__ float bias(const float* biases, int i) const {
    return biases ? biases[first * kVec + i] : 0.0f;
  }
  __device__ __forceinline__ Logits pair(T raw_s, T raw_t, int i) const {
    const float x_s = static_cast<float>(raw_s), x_t = static_cast<float>(raw_t);
    if constexpr (!TRANSFORMED) return raw_pair(x_s, x_t);
    return transformed_pair(x_s, bias(p.student_bias, i), x_t, bias(p.teacher_bias, i), p.student_transform,
                            p.teacher_transform, p.alike);
  }
  // No entry of a vector is above it, and one of the row reaches it.
  __device__ __forceinline__ float teacher_bound(const TeacherVector&, const Logits (&x)[kVec]) const {
    float max_t = x[0].x_t;
#pragma unroll
    for (int j = 1; j < kVec; ++j) max_t = fmaxf(max_t, x[j].x_t);
    return max_t;
  }
  __device__ __forceinline__ float unit() const { return TRANSFORMED ? 1.0f : p.student_transform.alpha; }
  __device__ __forceinline__ float slope(T raw, int i) const {
    if constexpr (!TRANSFORMED) return p.student_transform.alpha;
    return transform_slope(static_cast<float>(raw), bias(p.student_bias, i), p.student_transform);
  }
};

// An entry as pair_product leaves it: z_t less the largest z_t of its row in the tile, and z_s - z_t.
struct alignas(4) StoredPair {
  device::half below, gap;
};

// Stored pairs in the student's place, the tiles' tops in the teacher's: 4 bytes for an entry of both sides. x_t = top
// + below, x_s = x_t + gap, and the gap is as exact as it was stored.
template <typename P>
struct PairReader : RowReader<P, StoredPair, true, false> {
  using Rows = RowReader<P, StoredPair, true, false>;
  using Rows::count, Rows::first, Rows::kVec, Rows::p, Rows::student;
  using typename Rows::Vector;
  static constexpr int kSides = 1, kTileLoads = 2 * kLoadsInFlight, kInFlight = kTileLoads;

  const float* tops;  // of the row, in device memory

  // Of a vector, whose entries are all of one tile.
  struct TeacherVector {
    struct Top {
      float x;
      __device__ __forceinline__ float operator[](int) const { return x; }
    } value;
  };

  static __device__ __forceinline__ PairReader entire(const P& p, int64_t r) {
    static_assert(sizeof(StoredPair) == sizeof(float));  // a teacher's row begins where a row of tops does
    const Rows rows = Rows::entire(p, r);
    return {rows, device::known(reinterpret_cast<const float*>(rows.teacher))};
  }
  __device__ __forceinline__ PairReader part(int from, int size) const {
    return {{p, student + from, nullptr, from, size}, tops};
  }
  __device__ __forceinline__ PairReader kept(const Vector* slot, int, int from, int size) const {
    return {{p, slot, nullptr, from, size}, tops};
  }
  __device__ __forceinline__ void send(Vector* slot, int, uint64_t* barrier) const {
    const int bytes = count * kVectorBytes;
    hopper::barrier_arrive_expect(barrier, bytes);
    if (bytes > 0) hopper::copy_bytes(slot, student, bytes, barrier);
  }
  __device__ __forceinline__ TeacherVector read_teacher(int index, int step) const {
    constexpr int kTopVectors = kTileN / kVec;
    static_assert(kRowThreads % kTopVectors == 0);
    return {{tops[static_cast<unsigned>(first + index) / kTopVectors + step / kTopVectors]}};
  }
  __device__ __forceinline__ float teacher_entry(int i) const {
    return tops[static_cast<unsigned>(first * kVec + i) / kTileN];
  }
  __device__ __forceinline__ Logits pair(StoredPair stored, float top, int) const {
    const float x_t = top + static_cast<float>(stored.below), gap = static_cast<float>(stored.gap);
    return {x_t + gap, x_t, gap};
  }
  __device__ __forceinline__ float teacher_bound(const TeacherVector& t, const Logits (&)[kVec]) const {
    return t.value.x;
  }
  __device__ __forceinline__ float slope(StoredPair, int) const { return p.student_transform.alpha; }
};

// Two passes: one row a block, read where it lies, and read again from there.
template <typename Reader>
struct Passing {
  const typename Reader::Params& p;
  int64_t row = device::block_index();
  static constexpr int rank = 0, ranks = 1, parts = 1, turn = 0;

  __device__ __forceinline__ Passing(const typename Reader::Params& params, const RowLayout&, RowShared&) : p(params) {}
  __device__ __forceinline__ Reader take(const Reader& entire, int) { return entire; }
  __device__ __forceinline__ Reader again(const Reader& entire, int) const { return entire; }
  __device__ __forceinline__ void release(int) {}
  __device__ __forceinline__ void next() { row = p.rows; }
};

// One visit: the clusters take the rows in turn, and the slices of a block pass through its shared memory part by part,
// row after row, in `slots` places. A part's place is filled again as soon as its gradient is written, so that the next
// row is on its way during merge and gradient.
template <typename Reader>
struct RowRing {
  using Vector = typename Reader::Vector;

  const typename Reader::Params& p;
  const RowLayout& layout;
  uint64_t* full;  // a barrier a slot: the part is there
  Vector* memory;
  int rank = device::cluster_rank(), ranks = device::cluster_size();
  int clusters, row;
  int begin, end, parts;    // of the block's slices: their vectors
  int start = 0, slot = 0;  // of the row's first part; of the part that is taken next
  uint32_t phase = 0;       // of `slot`
  int turn = 0;             // 0 and 1, row by row
  int sent_row;             // the part that is sent next
  int sent_part = 0;

  __device__ __forceinline__ RowRing(const typename Reader::Params& params, const RowLayout& l, RowShared& shared)
      : p(params), layout(l), full(shared.full) {
    memory = reinterpret_cast<Vector*>(device::shared_memory() + sizeof(RowShared));
    clusters = static_cast<int>(device::block_count()) / ranks;
    sent_row = row = static_cast<int>(device::block_index()) / ranks;
    const int all = Reader::vectors(p), slice = (all + ranks - 1) / ranks;
    begin = rank * slice;
    end = begin + slice < all ? begin + slice : all;
    parts = (slice + layout.tile - 1) / layout.tile;
    if (device::thread_index() == 0) {
      for (int i = 0; i < layout.slots; ++i) hopper::barrier_init(&full[i], 1);
      hopper::barrier_init_fence();
      for (int i = 0; i < layout.slots; ++i) send(i);
    }
    device::block_sync();  // the barriers are made
  }
  __device__ __forceinline__ int from(int part) const { return begin + part * layout.tile; }
  __device__ __forceinline__ int size(int part) const {
    const int left = end - from(part);
    return left < layout.tile ? (left > 0 ? left : 0) : layout.tile;
  }
  __device__ __forceinline__ Vector* place(int index) const { return memory + index * Reader::kSides * layout.tile; }
  __device__ __forceinline__ void send(int index) {
    if (sent_row >= p.rows) return;
    Reader::entire(p, sent_row).part(from(sent_part), size(sent_part)).send(place(index), layout.tile, &full[index]);
    if (++sent_part == parts) {
      sent_part = 0;
      sent_row += clusters;
    }
  }
  __device__ __forceinline__ int place_of(int part) const {
    return start + part < layout.slots ? start + part : start + part - layout.slots;
  }
  __device__ __forceinline__ Reader kept(const Reader& entire, int index, int part) const {
    return entire.kept(place(index), layout.tile, from(part), size(part));
  }
  __device__ __forceinline__ Reader take(const Reader& entire, int part) {
    const int index = slot;
    hopper::barrier_wait(&full[index], phase);
    if (++slot == layout.slots) {
      slot = 0;
      phase ^= 1;
    }
    return kept(entire, index, part);
  }
  __device__ __forceinline__ Reader again(const Reader& entire, int part) const {
    return kept(entire, place_of(part), part);
  }
  __device__ __forceinline__ void release(int part) {
    device::block_sync();  // every thread has read it
    if (device::thread_index() == 0) send(place_of(part));
  }
  __device__ __forceinline__ void next() {
    start = slot;
    row += clusters;
    turn ^= 1;
  }
};

#endif  // a compiler for kernels

}  // namespace vigos
