// The CUDA row kernels on the CPU: the same kernel source, checks and bindings, with every thread of a cluster a
// cooperative fiber and the primitives of csrc/cuda/device.cuh put behind it. It proves indices, tails, barriers,
// merges and arithmetic; it says nothing about speed, memory ordering on the device, or ex2.approx (expf here). Limits:
// `exp_of<FAST>` is expf; fp16 and bf16 are emulated types with the same rounding.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define VIGOS_EMULATED
#define __device__
#define __forceinline__ inline

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  float slots[32];
  Barrier barrier;
};

struct Block {
  std::vector<char> shared;
  std::vector<Warp> warps;
  Barrier barrier;
  int64_t index = 0;
  int rank = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  int thread;
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline Cluster* cluster = nullptr;
inline const std::function<void()>* body = nullptr;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void entry() {
  (*body)();
  current->done = true;
  yield();
}

// Runs `blocks` blocks of `threads` threads, `ranks` blocks a cluster, one cluster after the other.
inline void launch(int64_t blocks, int ranks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t fibers = static_cast<size_t>(ranks) * threads;
  void* const stacks = mmap(nullptr, fibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  std::vector<Fiber> all(fibers);
  body = &kernel;
  for (int64_t first = 0; first < blocks; first += ranks) {
    Cluster here;
    here.blocks.resize(ranks);
    here.barrier.expected = ranks * threads;
    for (int rank = 0; rank < ranks; ++rank) {
      Block& block = here.blocks[rank];
      block.shared.assign(shared_bytes + 16, static_cast<char>(0xff));  // NaN: an unwritten float shows
      block.warps.resize(threads / 32);
      for (Warp& warp : block.warps) warp.barrier.expected = 32;
      block.barrier.expected = threads;
      block.index = first + rank;
      block.rank = rank;
    }
    cluster = &here;
    for (size_t i = 0; i < fibers; ++i) {
      Fiber& fiber = all[i];
      fiber.block = &here.blocks[i / threads];
      fiber.thread = static_cast<int>(i % threads);
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = static_cast<char*>(stacks) + i * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
    for (size_t left = fibers; left > 0;) {
      for (Fiber& fiber : all) {
        if (fiber.done) continue;
        current = &fiber;
        swapcontext(&scheduler, &fiber.context);
        left -= fiber.done;
      }
    }
  }
  munmap(stacks, fibers * kStack);
}

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

[[noreturn]] inline void fail(const char* what) {  // an exception would not cross a fiber
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

namespace vigos::device {

inline int thread_index() { return emulator::current->thread; }
inline int64_t block_index() { return emulator::current->block->index; }
inline void block_sync() { emulator::wait(emulator::current->block->barrier); }
inline float shuffle_xor(float x, int mask) {
  const int lane = thread_index() % 32;
  emulator::Warp& warp = emulator::current->block->warps[thread_index() / 32];
  warp.slots[lane] = x;
  emulator::wait(warp.barrier);
  const float y = warp.slots[lane ^ mask];
  emulator::wait(warp.barrier);
  return y;
}
inline char* shared_memory() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulator::current->block->shared.data());
  return reinterpret_cast<char*>((start + 15) / 16 * 16);
}
inline uint4 load(const uint4* address, bool) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("a 16-byte load is not aligned");
  return *address;
}
inline int cluster_rank() { return emulator::current->block->rank; }
inline int cluster_size() { return static_cast<int>(emulator::cluster->blocks.size()); }
inline void cluster_sync() { emulator::wait(emulator::cluster->barrier); }
template <typename T>
const T* cluster_map(T* shared, int rank) {
  const ptrdiff_t offset = reinterpret_cast<char*>(shared) - shared_memory();
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulator::cluster->blocks[rank].shared.data());
  return reinterpret_cast<const T*>((start + 15) / 16 * 16 + offset);
}

}  // namespace vigos::device

using __nv_bfloat16 = emulator::bfloat16;

#include "logits_rows_host.h"
#include "register.h"

namespace vigos {

// What the emulated device claims to be; set from Python, so that small rows take large clusters.
int compute_capability = 90;
int64_t shared_limit = 232448;

LogitsRowsPlan logits_rows_plan(int64_t vocab, Dtype dtype, int capability, int64_t limit) {
  return plan_rows(vocab, dtype, capability, limit);
}

template <typename T, typename G>
void run_rows(const LogitsRowsParams& p, const LogitsRowsPlan& plan, bool aligned) {
  const auto run = [&](auto aligned_, auto transformed_, auto resident_) {
    emulator::launch(p.rows * plan.cluster, plan.cluster, kRowThreads, plan.shared_bytes, [&] {
      logits_rows_body<T, G, decltype(aligned_)::value, decltype(transformed_)::value, decltype(resident_)::value>(p);
    });
  };
  const bool transformed = transforms_fully(p);
  using std::false_type, std::true_type;
  if (!aligned)
    return plan.resident ? run(false_type{}, true_type{}, true_type{}) : run(false_type{}, true_type{}, false_type{});
  if (transformed)
    return plan.resident ? run(true_type{}, true_type{}, true_type{}) : run(true_type{}, true_type{}, false_type{});
  return plan.resident ? run(true_type{}, false_type{}, true_type{}) : run(true_type{}, false_type{}, false_type{});
}

void logits_rows(const LogitsRowsParams& params, Dtype logits, Dtype gradient, const char* path, void*) {
  check_rows(params, logits, gradient, path);
  if (params.rows == 0) return;
  const LogitsRowsPlan plan = chosen_plan(params, logits, path, compute_capability, shared_limit);
  LogitsRowsParams p = params;
  p.alike = p.student_transform == p.teacher_transform;
  const bool aligned = vectors_fit(p, logits, gradient);
  using emulator::bfloat16, emulator::float16;
  if (logits == Dtype::kBFloat16) return run_rows<bfloat16, bfloat16>(p, plan, aligned);
  if (logits == Dtype::kFloat16) return run_rows<float16, float16>(p, plan, aligned);
  if (gradient == Dtype::kBFloat16) return run_rows<float, bfloat16>(p, plan, aligned);
  if (gradient == Dtype::kFloat16) return run_rows<float, float16>(p, plan, aligned);
  run_rows<float, float>(p, plan, aligned);
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
  if (logits == Dtype::kFloat32) return run_gradient<float>(p, aligned);
  if (logits == Dtype::kBFloat16) return run_gradient<emulator::bfloat16>(p, aligned);
  run_gradient<emulator::float16>(p, aligned);
}

}  // namespace vigos

// One row through numerics.h: out (4, n) is gap, delta, term and gradient of each entry.
void entries_of_a_row(const float* z_s, const float* z_t, int64_t n, int kind, float share, float entry_clip,
                      float* out) {
  using namespace vigos;
  const bool reverse = kind == kReverseKL;
  RowStats stats;
  for (int64_t i = 0; i < n; ++i) {
    raise<false>(stats, z_s[i], z_t[i], reverse);
    add<false>(stats, scaled_pair(z_s[i], z_t[i], 1.0f), reverse);
  }
  Row row = finish(stats, static_cast<Kind>(kind), share, entry_clip);
  for (int64_t i = 0; i < n && row.second(); ++i) {
    add_second(row.sums, row, entry_of<false>(row, scaled_pair(z_s[i], z_t[i], 1.0f)));
  }
  for (int64_t i = 0; i < n; ++i) {
    const Entry e = entry_of<false>(row, scaled_pair(z_s[i], z_t[i], 1.0f));
    const float fields[4] = {e.gap, e.delta, term(row, e).value, gradient(row, e)};
    for (int k = 0; k < 4; ++k) out[k * n + i] = fields[k];
  }
}

PYBIND11_MODULE(cuda_emulator, m) {
  vigos::register_cuda(m);
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
