// Splits the work of divergence.h over threads and picks the instruction set.
#include "divergence.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "threads.h"

namespace vigos::cpu {
namespace {

constexpr int64_t kLanes = 16;       // columns come in multiples of it
constexpr int64_t kSuperBlock = 96;  // rows of a head whose piece of it stays in the second-level cache
constexpr int64_t kPiece = 256;      // vocabulary entries of a packed piece of the head, and its panels: both and
constexpr int64_t kPanels = 7;       // the sums they add to stay in the second-level cache
constexpr int64_t kRowBlock = 1024;  // entries of a row at a time: 64 steps of 16 lanes
constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Floats at a cache line's boundary that grow and are kept by the thread that uses them.
class Scratch {
 public:
  float* at_least(int64_t n) {
    if (n > size_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64)));
      size_ = n;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

const Isa* best_isa() {
#ifdef VIGOS_X86
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return &isa_avx512();
  }
  if (fma && __builtin_cpu_supports("avx2")) return &isa_avx2();
#endif
  return &isa_portable();
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{best_isa()};
  return isa;
}

// Vocabulary slices of a visit: a function of the sizes alone.
struct Slices {
  int64_t n, length;

  explicit Slices(int64_t v, int64_t most = 32) {
    const int64_t blocks = (v + 63) / 64;
    n = std::max<int64_t>(1, std::min(most, blocks / 8));
    length = (blocks + n - 1) / n * 64;
  }
};

View slice_of(const Chunk& chunk, const Slices& slices, int64_t i) {
  const int64_t from = std::min(chunk.v, i * slices.length), end = std::min(chunk.v, from + slices.length);
  return {
      chunk.s + from * chunk.ld_s, chunk.t + from * chunk.ld_t, chunk.ld_s, chunk.ld_t, from, end - from, chunk.width};
}

void merge(double& top, double& total, double& first, double other_top, double other_total, double other_first) {
  const double most = std::max(top, other_top);
  const auto fall = [&](double from, double& sum, double& sum_first) {
    if (from == most || sum == 0.0) return;
    const double fallen = std::exp(from - most);
    sum_first = fallen * (sum_first + sum * (from - most));
    sum *= fallen;
  };
  fall(top, total, first);
  fall(other_top, other_total, other_first);
  top = most;
  total += other_total;
  first += other_first;
}

void merge(ColumnStatistics& into, const ColumnStatistics& other) {
  merge(into.top_s, into.total_s, into.first_s, other.top_s, other.total_s, other.first_s);
  merge(into.top_t, into.total_t, into.first_t, other.top_t, other.total_t, other.first_t);
}

constexpr ColumnStatistics kNothing = {kMinusInf, kMinusInf, 0.0, 0.0, 0.0, 0.0};

}  // namespace

const Isa& isa() { return *chosen().load(); }

bool select_isa(const char* name) {
  const Isa* best = best_isa();
  std::vector<const Isa*> runnable = {&isa_portable()};
#ifdef VIGOS_X86
  if (best != &isa_portable()) runnable.push_back(&isa_avx2());
  if (best == &isa_avx512()) runnable.push_back(&isa_avx512());
#endif
  if (std::strcmp(name, "best") == 0) {
    chosen() = best;
    return true;
  }
  for (const Isa* one : runnable) {
    if (std::strcmp(one->name, name) == 0) {
      chosen() = one;
      return true;
    }
  }
  return false;
}

void project(const Matrix& head, const float* x, int64_t ld_x, int64_t n, float* out, int64_t ld_out, int threads) {
  const Isa& table = isa();
  const int64_t k = head.columns;
  static thread_local Scratch packed_scratch;
  float* packed = packed_scratch.at_least(k * ((n + kLanes - 1) / kLanes * kLanes));
  const int64_t panels = (n + table.panel - 1) / table.panel;
  parallel_for(panels, threads, [&](int64_t p) {
    const int64_t from = p * table.panel, columns = std::min<int64_t>(table.panel, n - from);
    table.pack_rows(x + from * ld_x, ld_x, k, columns, packed + from * k);
  });
  parallel_for((head.rows + kSuperBlock - 1) / kSuperBlock, threads, [&](int64_t i) {
    static thread_local Scratch wide_scratch;
    const int64_t from = i * kSuperBlock, rows = std::min(kSuperBlock, head.rows - from);
    const float* a = static_cast<const float*>(head.at(from, 0));
    int64_t ld = head.ld;
    if (head.dtype != Dtype::kFloat32) {
      float* wide = wide_scratch.at_least(rows * k);
      for (int64_t r = 0; r < rows; ++r) table.widen(head.at(from + r, 0), head.dtype, k, wide + r * k);
      a = wide;
      ld = k;
    }
    table.multiply(a, ld, packed, rows, n, k, out + from * ld_out, ld_out, false);
  });
}

void backproject(const float* g, int64_t ld_g, int64_t l, const Matrix& head, float* out, int threads) {
  const Isa& table = isa();
  const int64_t d = head.columns, v = head.rows;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(8, v / 4096));
  const int64_t length = (v + parts - 1) / parts, group = kPanels * table.panel, groups = (d + group - 1) / group;
  static thread_local Scratch partial_scratch;
  float* partial = partial_scratch.at_least(parts * l * d);
  parallel_for(parts * groups, threads, [&](int64_t i) {
    static thread_local Scratch packed_scratch, tiles_scratch;
    float* packed = packed_scratch.at_least(kPiece * group);
    float* tiles = tiles_scratch.at_least(kPiece * (l + table.tile_rows));
    const int64_t part = i / groups, column = i % groups * group, columns = std::min(group, d - column);
    const int64_t begin = part * length, end = std::min(v, begin + length);
    float* dest = partial + part * l * d + column;
    if (begin >= end) {
      for (int64_t r = 0; r < l; ++r) std::fill_n(dest + r * d, columns, 0.0f);
    }
    for (int64_t from = begin; from < end; from += kPiece) {
      const int64_t rows = std::min(kPiece, end - from);
      table.pack_columns(head.at(from, column), head.dtype, head.ld, rows, columns, packed);
      table.pack_tiles(g + from * ld_g, ld_g, rows, l, tiles);
      Prefetch next;
      if (from + rows < end) {
        const int64_t size = item_size(head.dtype);
        next = {static_cast<const char*>(head.at(from + rows, column)), std::min(kPiece, end - from - rows),
                (columns * size + 63) / 64, head.ld * size};
      }
      table.multiply_tiles(tiles, packed, l, columns, rows, dest, d, from > begin, next);
    }
  });
  parallel_for(l, threads, [&](int64_t r) {
    for (int64_t c = 0; c < d; ++c) {
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part) sum += partial[(part * l + r) * d + c];
      out[r * d + c] = sum;
    }
  });
}

void accumulate_head(const float* g, int64_t ld_g, int64_t v, int64_t l, const float* hidden, int64_t d, float* out,
                     int threads) {
  const Isa& table = isa();
  static thread_local Scratch packed_scratch;
  float* packed = packed_scratch.at_least(l * ((d + kLanes - 1) / kLanes * kLanes));
  table.pack_columns(hidden, Dtype::kFloat32, d, l, d, packed);
  parallel_for((v + kSuperBlock - 1) / kSuperBlock, threads, [&](int64_t i) {
    const int64_t from = i * kSuperBlock, rows = std::min(kSuperBlock, v - from);
    table.multiply(g + from * ld_g, ld_g, packed, rows, d, l, out + from * d, d, true);
  });
}

void chunk_statistics(const Chunk& chunk, const Transforms& f, double* out, int threads) {
  const Isa& table = isa();
  const Slices slices(chunk.v);
  std::vector<ColumnStatistics> partial(slices.n * chunk.width, kNothing);
  parallel_for(slices.n, threads,
               [&](int64_t i) { table.statistics(slice_of(chunk, slices, i), f, partial.data() + i * chunk.width); });
  for (int64_t c = 0; c < chunk.width; ++c) {
    ColumnStatistics all = partial[c];
    for (int64_t i = 1; i < slices.n; ++i) merge(all, partial[i * chunk.width + c]);
    const double fields[6] = {all.top_s, all.top_t, all.total_s, all.total_t, all.first_s, all.first_t};
    for (int i = 0; i < 6; ++i) out[i * chunk.width + c] = fields[i];
  }
}

void chunk_measure(const Chunk& chunk, const Transforms& f, const Options& o, const Normalised& normalised, double* out,
                   int threads) {
  const Isa& table = isa();
  const Slices slices(chunk.v);
  std::vector<double> partial(slices.n * 2 * chunk.width, 0.0);
  parallel_for(slices.n, threads, [&](int64_t i) {
    double* value = partial.data() + i * 2 * chunk.width;
    table.measure(slice_of(chunk, slices, i), f, o, normalised, value, value + chunk.width);
  });
  std::copy_n(partial.data(), 2 * chunk.width, out);
  for (int64_t i = 1; i < slices.n; ++i) {
    for (int64_t c = 0; c < 2 * chunk.width; ++c) out[c] += partial[i * 2 * chunk.width + c];
  }
}

void chunk_gradient(const Chunk& chunk, const Transforms& f, const Options& o, const Normalised& normalised,
                    const int32_t* live, int64_t n_live, int64_t padded, int threads) {
  const Isa& table = isa();
  const std::vector<float> ones(chunk.width, 1.0f);
  bool all_live = n_live == chunk.width;
  for (int64_t j = 0; all_live && j < n_live; ++j) all_live = live[j] == j;
  constexpr int64_t kSteps = 64;
  parallel_for((chunk.v + kSteps - 1) / kSteps, threads, [&](int64_t i) {
    static thread_local Scratch scratch;
    const int64_t from = i * kSteps, steps = std::min(kSteps, chunk.v - from);
    float* s = chunk.s + from * chunk.ld_s;
    const View view = {s, chunk.t + from * chunk.ld_t, chunk.ld_s, chunk.ld_t, from, steps, chunk.width};
    if (all_live) return table.gradient(view, f, o, normalised, ones.data(), s, chunk.ld_s);
    float* block = scratch.at_least(kSteps * chunk.width);
    table.gradient(view, f, o, normalised, ones.data(), block, chunk.width);
    for (int64_t k = 0; k < steps; ++k) {
      float* dest = s + k * chunk.ld_s;
      for (int64_t j = 0; j < n_live; ++j) dest[j] = block[k * chunk.width + live[j]];
      for (int64_t j = n_live; j < padded; ++j) dest[j] = 0.0f;
    }
  });
}

namespace {

// `kRowBlock` entries of a row from `from` on as 64 steps of 16 lanes; -inf past v.
const float* row_block(const Isa& table, const Matrix& m, int64_t row, int64_t from, int64_t v, float* scratch) {
  const int64_t n = std::min(kRowBlock, v - from);
  if (m.dtype == Dtype::kFloat32 && n == kRowBlock) return static_cast<const float*>(m.at(row, from));
  table.widen(m.at(row, from), m.dtype, n, scratch);
  std::fill(scratch + n, scratch + (n + kLanes - 1) / kLanes * kLanes, -std::numeric_limits<float>::infinity());
  return scratch;
}

// Calls visit(view, from) for each block of a pair of rows.
template <typename Visit>
void for_row_blocks(const Isa& table, const Matrix& student, const Matrix& teacher, int64_t row_s, int64_t row_t,
                    int64_t v, Visit&& visit) {
  alignas(64) float wide_s[kRowBlock], wide_t[kRowBlock];
  for (int64_t from = 0; from < v; from += kRowBlock) {
    const float* s = row_block(table, student, row_s, from, v, wide_s);
    const float* t = row_block(table, teacher, row_t, from, v, wide_t);
    const int64_t steps = (std::min(kRowBlock, v - from) + kLanes - 1) / kLanes;
    visit(View{s, t, kLanes, kLanes, 0, steps, kLanes}, from);
  }
}

// One row's constants, repeated over the lanes.
struct RowConstants {
  float values[Known::kColumns][kLanes];
  int32_t kind[kLanes];

  RowConstants(const float (&known)[Known::kColumns], int32_t row_kind) {
    for (int i = 0; i < Known::kColumns; ++i) std::fill_n(values[i], kLanes, known[i]);
    std::fill_n(kind, kLanes, row_kind);
  }
  Normalised view() const { return normalised(values[0], kLanes, kind); }
};

}  // namespace

void rows_forward(const Matrix& student, const Matrix& teacher, const int64_t* student_row, const int64_t* teacher_row,
                  const int32_t* kind, int64_t n, int64_t v, const Transforms& f, const Options& o, double* out,
                  int threads) {
  const Isa& table = isa();
  parallel_for(n, threads, [&](int64_t r) {
    ColumnStatistics lanes[kLanes];
    std::fill_n(lanes, kLanes, kNothing);
    for_row_blocks(table, student, teacher, student_row[r], teacher_row[r], v,
                   [&](const View& view, int64_t) { table.statistics(view, f, lanes); });
    ColumnStatistics all = lanes[0];
    for (int64_t l = 1; l < kLanes; ++l) merge(all, lanes[l]);
    const double log_s = std::log(all.total_s), log_t = std::log(all.total_t);
    double* dest = out + r * RowOutput::kColumns;
    dest[Known::kTopS] = all.top_s;
    dest[Known::kLogSumS] = log_s;
    dest[Known::kTopT] = all.top_t;
    dest[Known::kLogSumT] = log_t;
    dest[Known::kLseGap] = (all.top_s - all.top_t) + std::log(all.total_s / all.total_t);
    dest[Known::kMeanSlope] = dest[RowOutput::kDivergence] = 0.0;
    dest[RowOutput::kEntropyS] = log_s - all.first_s / all.total_s;
    dest[RowOutput::kEntropyT] = log_t - all.first_t / all.total_t;
    dest[RowOutput::kLseS] = all.top_s + log_s;
    dest[RowOutput::kLseT] = all.top_t + log_t;
    float known[Known::kColumns];
    for (int i = 0; i < Known::kColumns; ++i) known[i] = static_cast<float>(dest[i]);
    const RowConstants constants(known, kind[r]);
    double value[kLanes] = {}, gradient[kLanes] = {};
    for_row_blocks(table, student, teacher, student_row[r], teacher_row[r], v,
                   [&](const View& view, int64_t) { table.measure(view, f, o, constants.view(), value, gradient); });
    for (int64_t l = 0; l < kLanes; ++l) {
      dest[RowOutput::kDivergence] += value[l];
      dest[Known::kMeanSlope] += gradient[l];
    }
  });
}

void rows_backward(const Matrix& student, const Matrix& teacher, const int64_t* student_row, const int64_t* teacher_row,
                   const int32_t* kind, const float* state, int64_t ld_state, const float* scale, int64_t n, int64_t v,
                   const Transforms& f, const Options& o, const Matrix& out, bool add, int threads) {
  const Isa& table = isa();
  parallel_for(n, threads, [&](int64_t r) {
    float known[Known::kColumns], factor[kLanes];
    std::copy_n(state + r * ld_state, Known::kColumns, known);
    std::fill_n(factor, kLanes, scale[r]);
    const RowConstants constants(known, kind[r]);
    alignas(64) float block[kRowBlock], before[kRowBlock];
    for_row_blocks(table, student, teacher, student_row[r], teacher_row[r], v, [&](const View& view, int64_t from) {
      table.gradient(view, f, o, constants.view(), factor, block, kLanes);
      const int64_t count = std::min(kRowBlock, v - from);
      void* dest = const_cast<void*>(out.at(student_row[r], from));
      if (add) {
        table.widen(dest, out.dtype, count, before);
        for (int64_t i = 0; i < count; ++i) block[i] += before[i];
      }
      table.narrow(block, count, dest, out.dtype);
    });
    std::memset(const_cast<void*>(out.at(student_row[r], v)), 0, (out.columns - v) * item_size(out.dtype));
  });
}

}  // namespace vigos::cpu
