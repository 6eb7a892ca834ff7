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
constexpr int64_t kSuperBlock = 96;  // rows of a head whose logits stay in the second-level cache
constexpr int64_t kPanels = 7;       // of a packed piece of the head: it and the sums it adds to stay there too
constexpr int64_t kStrip = 1024;     // columns of the head that share a packed piece of the gradient
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

// Vocabulary slices of a visit, whole super-blocks: a function of the sizes alone.
struct Slices {
  int64_t n, length;

  explicit Slices(int64_t v) {
    const int64_t blocks = (v + kSuperBlock - 1) / kSuperBlock;
    n = std::max<int64_t>(1, std::min<int64_t>(64, blocks / 8));
    length = (blocks + n - 1) / n * kSuperBlock;
  }
};

View view_of(const Chunk& chunk, int64_t from, int64_t end) {
  return {chunk.s + from * chunk.ld_s,
          chunk.t + from * chunk.ld_t,
          chunk.ld_s,
          chunk.ld_t,
          chunk.start + from,
          end - from,
          chunk.width};
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

// Merges column `theirs` of other sums, (Sums::kRows, width), into column `ours`.
void merge(double* sums, int64_t ours, const double* other, int64_t theirs, int64_t width) {
  for (const int side : {0, 1}) {
    double* row = sums + side * width + ours;
    const double* other_row = other + side * width + theirs;
    merge(row[Sums::kTopS * width], row[Sums::kTotalS * width], row[Sums::kFirstS * width],
          other_row[Sums::kTopS * width], other_row[Sums::kTotalS * width], other_row[Sums::kFirstS * width]);
  }
}

// Merges every slice's sums, in order.
void merge(double* sums, const std::vector<double>& partial, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    for (size_t i = 0; i < partial.size(); i += Sums::kRows * width) merge(sums, c, partial.data() + i, c, width);
  }
}

void clear(double* sums, int64_t width) {
  std::fill_n(sums, Sums::kTotalS * width, kMinusInf);
  std::fill_n(sums + Sums::kTotalS * width, (Sums::kRows - Sums::kTotalS) * width, 0.0);
}

int64_t rounded_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

void project(const Matrix& head, const float* x, int64_t ld_x, int64_t n, float* out, int64_t ld_out,
             const Statistics* statistics, int threads) {
  const Isa& table = isa();
  const int64_t k = head.columns, v = head.rows, size = item_size(head.dtype),
                width = statistics ? statistics->chunk.width : 0;
  static thread_local Scratch packed_scratch;
  float* packed = packed_scratch.at_least(k * rounded_up(n));  // a block for each piece of the depth
  parallel_for((n + table.panel - 1) / table.panel, threads, [&](int64_t i) {
    const int64_t from = i * table.panel, columns = std::min<int64_t>(table.panel, n - from);
    for (int64_t p = 0; p < k; p += kDepth) {
      const int64_t depth = std::min(kDepth, k - p);
      table.pack_rows(x + from * ld_x + p, ld_x, depth, columns, packed + p * rounded_up(n) + from * depth);
    }
  });
  const Slices slices(v);
  std::vector<double> partial(slices.n * Sums::kRows * width);
  parallel_for(slices.n, threads, [&](int64_t i) {
    static thread_local Scratch wide_scratch;
    float* wide = head.dtype == Dtype::kFloat32 ? nullptr : wide_scratch.at_least(kSuperBlock * kDepth);
    double* sums = partial.data() + i * Sums::kRows * width;
    if (statistics != nullptr) clear(sums, width);
    const int64_t end = std::min(v, (i + 1) * slices.length);
    for (int64_t from = i * slices.length; from < end; from += kSuperBlock) {
      const int64_t rows = std::min(kSuperBlock, end - from);
      for (int64_t p = 0; p < k; p += kDepth) {
        const int64_t depth = std::min(kDepth, k - p), after = p + depth < k ? p + depth : 0;
        const int64_t then = after > 0 ? from : from + rows;  // the rows that are multiplied next
        Prefetch next;
        if (then < end) {
          next = {static_cast<const char*>(head.at(then, after)), std::min(kSuperBlock, end - then),
                  (std::min(kDepth, k - after) * size + 63) / 64, head.ld * size};
        }
        for (int64_t r = 0; wide != nullptr && r < rows; ++r) {
          table.widen(head.at(from + r, p), head.dtype, depth, wide + r * depth);
        }
        table.multiply(wide != nullptr ? wide : static_cast<const float*>(head.at(from, p)),
                       wide != nullptr ? depth : head.ld, packed + p * rounded_up(n), rows, n, depth,
                       out + from * ld_out, ld_out, p > 0, next);
      }
      if (statistics != nullptr) {
        table.statistics(view_of(statistics->chunk, from, from + rows), statistics->f, sums);
      }
    }
  });
  if (statistics != nullptr) merge(statistics->sums, partial, width);
}

void chunk_statistics(const Statistics& statistics, int threads) {
  const Isa& table = isa();
  const int64_t v = statistics.chunk.v, width = statistics.chunk.width;
  const Slices slices(v);
  std::vector<double> partial(slices.n * Sums::kRows * width);
  parallel_for(slices.n, threads, [&](int64_t i) {
    double* sums = partial.data() + i * Sums::kRows * width;
    clear(sums, width);
    const int64_t from = std::min(v, i * slices.length), end = std::min(v, from + slices.length);
    table.statistics(view_of(statistics.chunk, from, end), statistics.f, sums);
  });
  merge(statistics.sums, partial, width);
}

void backproject(const Slopes& g, const Matrix& head, float* out, int threads) {
  const Isa& table = isa();
  const int64_t d = head.columns, v = head.rows, l = g.n, size = item_size(head.dtype);
  const int64_t strips = (d + kStrip - 1) / kStrip, strip = rounded_up((d + strips - 1) / strips);
  const int64_t parts = std::clamp<int64_t>(v / 4096, 1, strips == 1 ? 16 : 8), length = (v + parts - 1) / parts;
  const int64_t group = std::min(strip, kPanels * table.panel);
  static thread_local Scratch partial_scratch;
  float* partial = partial_scratch.at_least(parts * l * d);
  parallel_for(parts * strips, threads, [&](int64_t i) {
    static thread_local Scratch packed_scratch, tiles_scratch, work_scratch;
    float* packed = packed_scratch.at_least(kDepth * group);
    float* tiles = tiles_scratch.at_least(kDepth * (l + table.tile_rows));
    float* work = work_scratch.at_least(kGradientRows * g.width);
    const int64_t part = i / strips, left = std::min(d, i % strips * strip), right = std::min(d, left + strip);
    const int64_t begin = part * length, end = std::min(v, begin + length);
    float* dest = partial + part * l * d;
    for (int64_t r = 0; begin >= end && r < l; ++r) std::fill(dest + r * d + left, dest + r * d + right, 0.0f);
    for (int64_t from = begin; from < end; from += kDepth) {
      const int64_t rows = std::min(kDepth, end - from);
      table.pack_tiles(g, from, rows, work, tiles);
      for (int64_t column = left; column < right; column += group) {
        const int64_t columns = std::min(group, right - column);
        const int64_t after = column + columns < right ? column + columns : left;
        const int64_t then = after > left ? from : from + rows;
        Prefetch next;
        if (then < end) {
          next = {static_cast<const char*>(head.at(then, after)), std::min(kDepth, end - then),
                  (std::min(group, right - after) * size + 63) / 64, head.ld * size};
        }
        table.pack_columns(head.at(from, column), head.dtype, head.ld, rows, columns, packed);
        table.multiply(tiles, 0, packed, l, columns, rows, dest + column, d, from > begin, next);
      }
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

void accumulate_head(const Slopes& g, int64_t v, const float* hidden, int64_t d, const float* weight, float* out,
                     float* bias, int threads) {
  const Isa& table = isa();
  const int64_t l = g.n;
  static thread_local Scratch packed_scratch;
  float* packed = packed_scratch.at_least(l * rounded_up(d));
  for (int64_t p = 0; p < l; p += kDepth) {
    table.pack_columns(hidden + p * d, Dtype::kFloat32, d, std::min(kDepth, l - p), d, packed + p * rounded_up(d));
  }
  parallel_for((v + kSuperBlock - 1) / kSuperBlock, threads, [&](int64_t i) {
    static thread_local Scratch rows_scratch;
    const int64_t from = i * kSuperBlock, rows = std::min(kSuperBlock, v - from);
    float* block = rows_scratch.at_least(rows * rounded_up(l));
    for (int64_t r = 0; r < rows; ++r) {
      table.gradient_row(g, from + r, block + r * rounded_up(l));
      for (int64_t j = 0; bias != nullptr && j < l; ++j) bias[from + r] += block[r * rounded_up(l) + j] * weight[j];
    }
    for (int64_t p = 0; out != nullptr && p < l; p += kDepth) {
      table.multiply(block + p, rounded_up(l), packed + p * rounded_up(d), rows, d, std::min(kDepth, l - p),
                     out + from * d, d, true, {});
    }
  });
}

void chunk_measure(const Chunk& chunk, const Transforms& f, const Options& o, const Normalised& normalised, bool write,
                   double* out, int threads) {
  const Isa& table = isa();
  const Slices slices(chunk.v);
  std::vector<double> partial(slices.n * 2 * chunk.width, 0.0);
  parallel_for(slices.n, threads, [&](int64_t i) {
    const int64_t from = std::min(chunk.v, i * slices.length), end = std::min(chunk.v, from + slices.length);
    const View view = view_of(chunk, from, end);
    double* value = partial.data() + i * 2 * chunk.width;
    table.measure(view, f, o, normalised, value, value + chunk.width, write ? chunk.s + from * chunk.ld_s : nullptr,
                  write ? chunk.t + from * chunk.ld_t : nullptr);
  });
  std::copy_n(partial.data(), 2 * chunk.width, out);
  for (int64_t i = 1; i < slices.n; ++i) {
    for (int64_t c = 0; c < 2 * chunk.width; ++c) out[c] += partial[i * 2 * chunk.width + c];
  }
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
    double sums[Sums::kRows * kLanes];
    clear(sums, kLanes);
    for_row_blocks(table, student, teacher, student_row[r], teacher_row[r], v,
                   [&](const View& view, int64_t) { table.statistics(view, f, sums); });
    for (int64_t l = 1; l < kLanes; ++l) merge(sums, 0, sums, l, kLanes);
    const auto all = [&](int row) { return sums[row * kLanes]; };
    const double top_s = all(Sums::kTopS), top_t = all(Sums::kTopT), total_s = all(Sums::kTotalS),
                 total_t = all(Sums::kTotalT), log_s = std::log(total_s), log_t = std::log(total_t);
    double* dest = out + r * RowOutput::kColumns;
    dest[Known::kTopS] = top_s;
    dest[Known::kLogSumS] = log_s;
    dest[Known::kTopT] = top_t;
    dest[Known::kLogSumT] = log_t;
    dest[Known::kLseGap] = (top_s - top_t) + std::log(total_s / total_t);
    dest[Known::kMeanSlope] = dest[RowOutput::kDivergence] = 0.0;
    dest[RowOutput::kEntropyS] = log_s - all(Sums::kFirstS) / total_s;
    dest[RowOutput::kEntropyT] = log_t - all(Sums::kFirstT) / total_t;
    dest[RowOutput::kLseS] = top_s + log_s;
    dest[RowOutput::kLseT] = top_t + log_t;
    float known[Known::kColumns];
    for (int i = 0; i < Known::kColumns; ++i) known[i] = static_cast<float>(dest[i]);
    const RowConstants constants(known, kind[r]);
    double value[kLanes] = {}, gradient[kLanes] = {};
    for_row_blocks(table, student, teacher, student_row[r], teacher_row[r], v, [&](const View& view, int64_t) {
      table.measure(view, f, o, constants.view(), value, gradient, nullptr, nullptr);
    });
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
