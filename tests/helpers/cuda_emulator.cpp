// The CUDA kernels on the CPU: the same kernel source, checks and bindings, with every thread of a cluster a
// cooperative fiber (cuda_fibers.h), the primitives of csrc/cuda/device.cuh and hopper.cuh put behind it
// (cuda_device.h), and guard pages about the operands (cuda_operands.h). It proves indices, tails, barriers, phases,
// merges and arithmetic, in any order of threads and at any legal moment of copies and products; it says nothing about
// speed, bank conflicts, memory order between threads that do synchronise, or ex2.approx (exp2f here). fp16 and bf16
// are types with the same rounding. The launch of linear_hopper.cu and its tensor maps are not part of it.
#include "cuda_device.h"
#include "cuda_operands.h"
#include "linear_hopper_host.h"
#include "logits_rows_host.h"
#include "register.h"

namespace vigos {

// What the emulated device claims to be; set from Python, so that small rows take large clusters.
int compute_capability = 90;
int64_t shared_limit = 232448;
constexpr int multiprocessors = 4;  // two clusters, which have several tiles each

LogitsRowsPlan logits_rows_plan(int64_t vocab, Dtype dtype, int capability, int64_t limit) {
  return plan_rows(vocab, dtype, capability, limit);
}

bool logits_rows_stay(int64_t vocab, Dtype dtype) {
  return plan_rows(vocab, dtype, compute_capability, shared_limit, kPortableCluster).resident;
}

template <typename Reader, typename G>
void launch_rows(const LogitsRowsParams& p, const LogitsRowsPlan& plan) {
  const auto run = [&](auto resident_) {
    constexpr bool kResident = decltype(resident_)::value;
    const int64_t clusters = kResident ? std::min<int64_t>(p.rows, 1 + emulator::seed % 3) : p.rows;
    emulator::launch(clusters * plan.cluster, plan.cluster, kRowThreads, plan.shared_bytes,
                     [&] { logits_rows_body<Reader, G, kResident>(p, plan.layout); });
  };
  if constexpr (Reader::kVec > 1) {
    if (plan.resident) return run(std::true_type{});
  }
  run(std::false_type{});
}

template <typename G>
void run_pairs(const LogitsRowsParams& p, const LogitsRowsPlan& plan) {
  launch_rows<PairReader<LogitsRowsParams>, G>(p, plan);
}

template <typename T, typename G>
void run_rows(const LogitsRowsParams& p, const LogitsRowsPlan& plan, bool aligned) {
  const auto run = [&](auto aligned_, auto transformed_) {
    launch_rows<RowReader<LogitsRowsParams, T, decltype(aligned_)::value, decltype(transformed_)::value>, G>(p, plan);
  };
  using std::false_type, std::true_type;
  if (!aligned) return run(false_type{}, true_type{});
  transforms_fully(p) ? run(true_type{}, true_type{}) : run(true_type{}, false_type{});
}

void logits_rows(const LogitsRowsParams& params, Dtype logits, Dtype gradient, const char* path, void*) {
  check_rows(params, logits, gradient, path);
  if (params.rows == 0) return;
  LogitsRowsParams p = params;
  p.alike = p.student_transform == p.teacher_transform;
  const bool aligned = vectors_fit(p, logits, gradient);
  const LogitsRowsPlan plan = chosen_plan(params, logits, path, aligned, compute_capability, shared_limit);
  const int64_t r = p.rows, v = p.vocab;
  emulator::Operands operands;
  operands.matrix(p.student, emulator::rows_named(p.student_row, r), v, p.stride_student, item_size(logits));
  const int64_t across = logits == Dtype::kStoredPair ? (v + kTileN - 1) / kTileN : v;
  operands.matrix(p.teacher, emulator::rows_named(p.teacher_row, r), across, p.stride_teacher, item_size(logits));
  operands.matrix(p.dlogits, emulator::rows_named(p.dlogits_row, r), v, p.stride_dlogits, item_size(gradient));
  for (const int64_t** of : {&p.student_row, &p.teacher_row, &p.dlogits_row, &p.labels}) operands.array(*of, r);
  for (const float** of : {&p.weight, &p.clip}) operands.array(*of, r);
  for (const float** of : {&p.student_bias, &p.teacher_bias}) operands.array(*of, v);
  for (float** of : {&p.divergence, &p.student_entropy, &p.teacher_entropy, &p.student_lse, &p.teacher_lse,
                     &p.student_logprob, &p.teacher_logprob}) {
    operands.array(*of, r);
  }
  operands.array(p.kind, r);
  operands.array(p.clipped, r);
  operands.array(p.state, r * State::kColumns);
#if defined(VIGOS_EMULATED_FEW)  // compiles faster
  logits == Dtype::kStoredPair ? run_pairs<emulator::bfloat16>(p, plan) : run_rows<float, float>(p, plan, aligned);
#else
  using emulator::bfloat16, emulator::float16;
  if (logits == Dtype::kStoredPair) {
    gradient == Dtype::kBFloat16 ? run_pairs<bfloat16>(p, plan) : run_pairs<float16>(p, plan);
  } else if (logits == Dtype::kBFloat16) {
    run_rows<bfloat16, bfloat16>(p, plan, aligned);
  } else if (logits == Dtype::kFloat16) {
    run_rows<float16, float16>(p, plan, aligned);
  } else if (gradient == Dtype::kBFloat16) {
    run_rows<float, bfloat16>(p, plan, aligned);
  } else if (gradient == Dtype::kFloat16) {
    run_rows<float, float16>(p, plan, aligned);
  } else {
    run_rows<float, float>(p, plan, aligned);
  }
#endif
  operands.give_back();
}

template <typename T>
void run_gradient(const LogitsGradientParams& p, bool aligned) {
  const GradientGrid grid = gradient_grid(p, aligned ? kVectorBytes / static_cast<int64_t>(sizeof(T)) : 1);
  const auto run = [&](auto aligned_, auto transformed_) {
    emulator::launch(grid.blocks, 1, kGradientThreads, 0, [&] {
      logits_gradient_body<T, decltype(aligned_)::value, decltype(transformed_)::value>(p, grid.blocks_per_row);
    });
  };
  using std::false_type, std::true_type;
  if (!aligned) return run(false_type{}, true_type{});
  if (transforms_fully(p)) return run(true_type{}, true_type{});
  run(true_type{}, false_type{});
}

void logits_gradient(const LogitsGradientParams& params, Dtype logits, void*) {
  check_gradient(params, logits);
  if (params.rows == 0) return;
  LogitsGradientParams p = params;
  p.alike = p.student_transform == p.teacher_transform;
  const bool aligned = vectors_fit(p, logits, logits);
  const int64_t r = p.offsets[p.rows], v = p.vocab;
  emulator::Operands operands;
  operands.matrix(p.student, p.rows, v, p.stride_student, item_size(logits));
  operands.matrix(p.teacher, emulator::rows_named(p.teacher_row, r), v, p.stride_teacher, item_size(logits));
  operands.matrix(p.dlogits, p.rows, v, p.stride_dlogits, item_size(logits), p.kept != nullptr);
  for (const int64_t** of : {&p.order, &p.teacher_row}) operands.array(*of, r);
  for (const float** of : {&p.student_bias, &p.teacher_bias}) operands.array(*of, v);
  operands.array(p.offsets, p.rows + 1);
  operands.array(p.kind, r);
  for (const float** of : {&p.row_grad, &p.kept}) operands.array(*of, r);
  operands.array(p.state, r * State::kColumns);
#if defined(VIGOS_EMULATED_FEW)
  run_gradient<float>(p, aligned);
#else
  if (logits == Dtype::kFloat32) {
    run_gradient<float>(p, aligned);
  } else if (logits == Dtype::kBFloat16) {
    run_gradient<emulator::bfloat16>(p, aligned);
  } else {
    run_gradient<emulator::float16>(p, aligned);
  }
#endif
  operands.give_back();
}

template <bool SHARED_HEAD, bool BFLOAT>
void run_product(PairProductParams p) {
  static_assert(kTileM == hopper::kBoxRows && kTileN == hopper::kBoxRows && 2 * kTileK == hopper::kBoxRowBytes);
  const auto map = [](const void* data, int64_t rows, int64_t columns, int64_t stride) {
    return hopper::TensorMap{static_cast<const uint16_t*>(data), rows, columns, stride};
  };
  const HopperMaps maps{map(p.student_hidden, p.rows, p.d, p.stride_student_hidden),
                        map(p.teacher_hidden, p.rows, p.d_t, p.stride_teacher_hidden),
                        map(p.student_weight, p.vocab, p.d, p.stride_student_weight),
                        map(p.teacher_weight, p.vocab, p.d_t, p.stride_teacher_weight)};
  p.clusters = product_clusters(p, multiprocessors);
  emulator::launch(p.clusters * kClusterTiles, kClusterTiles, kHopperThreads, HopperShared<SHARED_HEAD>::kBytes,
                   [&] { pair_product_body<SHARED_HEAD, BFLOAT>(p, maps); });
}

void pair_product(const PairProductParams& params, Dtype dtype, void*) {
  check_pair_product(params, dtype);
  if (params.rows == 0) return;
  PairProductParams p = params;
  const int64_t r = p.rows, v = p.vocab;
  emulator::Operands operands;
  operands.matrix(p.student_hidden, r, p.d, p.stride_student_hidden, 2);
  operands.matrix(p.teacher_hidden, r, p.d_t, p.stride_teacher_hidden, 2);
  operands.matrix(p.student_weight, v, p.d, p.stride_student_weight, 2);
  operands.matrix(p.teacher_weight, v, p.d_t, p.stride_teacher_weight, 2);
  operands.matrix(p.pairs, r, vocab_tiles(p) * kTileN, p.stride_pairs, 4);
  operands.matrix(p.tops, r, vocab_tiles(p), p.stride_tops, 4);
  if (dtype == Dtype::kBFloat16) {
    p.teacher_weight ? run_product<false, true>(p) : run_product<true, true>(p);
  } else {
    p.teacher_weight ? run_product<false, false>(p) : run_product<true, false>(p);
  }
  operands.give_back();
}

}  // namespace vigos

// One row through numerics.h: out (4, n) is gap, delta, term and gradient of each entry.
void entries_of_a_row(const float* z_s, const float* z_t, int64_t n, int kind, float share, float entry_clip,
                      float* out) {
  using namespace vigos;
  const bool reverse = kind == kReverseKL;
  RowStats stats;
  for (int64_t i = 0; i < n; ++i) {
    raise(stats, z_s[i] * kLog2E, z_t[i] * kLog2E, reverse);
    add(stats, raw_pair(z_s[i], z_t[i]), 1.0f, stats.shift(), stats.shift_t(), reverse);
  }
  Row row = finish(stats, static_cast<Kind>(kind), share, entry_clip, 1.0f);
  for (int64_t i = 0; i < n && row.second(); ++i) {
    add_second(row.sums, row, entry_of(row, raw_pair(z_s[i], z_t[i])));
  }
  for (int64_t i = 0; i < n; ++i) {
    const Entry e = entry_of(row, raw_pair(z_s[i], z_t[i]));
    const float fields[4] = {e.gap, e.delta, term(row, e).value, gradient(row, e)};
    for (int k = 0; k < 4; ++k) out[k * n + i] = fields[k];
  }
}

namespace py = pybind11;

PYBIND11_MODULE(cuda_emulator, m) {
  vigos::register_cuda(m);
  m.def("set_seed", [](uint64_t seed) { emulator::seed = seed; });
  m.def("entries_of_a_row",
        [](uintptr_t z_s, uintptr_t z_t, int64_t n, int kind, float share, float clip, uintptr_t out) {
          entries_of_a_row(reinterpret_cast<const float*>(z_s), reinterpret_cast<const float*>(z_t), n, kind, share,
                           clip, reinterpret_cast<float*>(out));
        });
  m.def("set_device", [](int capability, int64_t limit) {
    vigos::compute_capability = capability;
    vigos::shared_limit = limit;
  });
}
