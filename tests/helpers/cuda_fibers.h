// Threads of blocks and clusters as fibers whose order a seed draws: some warps and blocks sleep while others run on,
// several clusters run among each other, and what a thread block leaves in shared memory is gone when its last thread
// ends. What a kernel may not do ends the launch with std::runtime_error: see fail().
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

constexpr size_t kStack = 64 * 1024, kPage = 4096;
constexpr int kPoison = 0xff;  // a NaN in every float format

// Memory that ends, but for less than 16 bytes, at a page that faults, and has another before it. Its address is
// `phase` past a multiple of 16.
class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t phase = 0) : bytes_(bytes) {
    const size_t inner = (bytes + 16 + kPage - 1) / kPage * kPage;
    length_ = inner + 2 * kPage;
    pages_ = static_cast<char*>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(pages_, kPage, PROT_NONE);
    mprotect(pages_ + kPage + inner, kPage, PROT_NONE);
    std::memset(pages_ + kPage, kPoison, inner);
    data_ = pages_ + kPage + (inner - bytes - phase) / 16 * 16 + phase;
  }
  Guarded(Guarded&& from) noexcept
      : bytes_(from.bytes_), length_(from.length_), pages_(std::exchange(from.pages_, nullptr)), data_(from.data_) {}
  ~Guarded() {
    if (pages_) munmap(pages_, length_);
  }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool slack_untouched() const {
    for (const char* at = data_ + bytes_; at < pages_ + length_ - kPage; ++at) {
      if (*at != static_cast<char>(kPoison)) return false;
    }
    return true;
  }

 private:
  size_t bytes_, length_;
  char *pages_, *data_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  uint32_t operator()(uint32_t below) {  // in [0, below)
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 33) % below;
  }

 private:
  uint64_t state_;
};

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  float slots[2][32];
  Barrier barrier;
};

// A product of a warpgroup as one of its threads sees it: 64 of its accumulators.
struct Product {
  float* d;
  uint64_t a, b;
  bool accumulate, bfloat;
  int group;  // of products that were committed together
  bool done = false;
};

struct Products {
  std::vector<Product> queue;
  std::map<float*, std::array<float, 64>> in_flight;  // what the accumulators hold while the thread sees NaN
  int group = 0;
  bool fenced = false;
};

struct Cluster;

struct Block {
  Cluster* cluster;
  Guarded shared;
  std::vector<Warp> warps;
  Barrier barrier;
  int64_t index;
  int rank, left;
  bool slow;  // the other blocks run sixteen times as often
  bool barriers_unfenced = false;
  unsigned passed = 0;  // barriers of the cluster
  uint64_t awake = 0;
  std::vector<std::function<bool()>> copies;  // of the copy engine: each call writes a part; true with the last
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  int thread;
  bool done = false;
  std::function<bool()> ready;  // empty: at once
  Products products;
};

// Of one launch. How late copies and products come is drawn once a launch, so that each extreme has its turns.
struct Launch {
  ucontext_t scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* body;
  Random random;
  std::string failure;
  uint32_t copy_chance, product_chance;  // in 16, whenever one may come
  int64_t blocks;
  uint64_t now = 0, latest = 0;  // turns of the scheduler; when the last of those that rest is awake
};

inline Launch* run = nullptr;
inline uint64_t seed = 0;  // of the next launch; each takes one

inline Fiber& current() { return *run->current; }
inline bool chance(uint32_t in_16) { return run->random(16) < in_16; }

// Ends the launch from inside a kernel; the fibers' stacks are dropped as they are.
[[noreturn]] inline void fail(const char* what) {
  run->failure = what;
  setcontext(&run->scheduler);
  __builtin_unreachable();
}

inline void on_fault(int, siginfo_t*, void*) { fail("memory outside of an operand, or of shared memory, is used"); }

inline void yield() { swapcontext(&current().context, &run->scheduler); }

inline void yield_until(std::function<bool()> ready) {
  if (ready() && !chance(4)) return;
  current().ready = std::move(ready);
  yield();
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  yield_until([&barrier, generation] { return barrier.generation != generation; });
}

// Some blocks rest after a barrier of the cluster, for so long that the others come as far as they can.
inline void wait_for_cluster(Block& block) {
  Barrier& barrier = block.cluster->barrier;
  wait(barrier);
  if (block.passed != barrier.generation) {
    block.passed = barrier.generation;
    block.awake = chance(4) ? run->now + 512 : 0;
    run->latest = std::max(run->latest, block.awake);
  }
  yield_until([&block] { return run->now >= block.awake; });
}

inline void entry() {
  (*run->body)();
  Fiber& fiber = current();
  if (!fiber.products.in_flight.empty()) fail("a thread ends before its products");
  fiber.done = true;
  Block& block = *fiber.block;
  if (--block.left == 0) {
    if (!block.copies.empty()) fail("a block ends before its copies");
    std::memset(block.shared.data(), kPoison, block.shared.bytes());
  }
  yield();
}

class Scheduler {
 public:
  Scheduler(int64_t blocks, int ranks, int threads, size_t shared_bytes, Launch& launch)
      : ranks_(ranks), threads_(threads), shared_bytes_(shared_bytes), launch_(launch), waiting_(blocks / ranks) {
    std::iota(waiting_.begin(), waiting_.end(), int64_t{0});
    shuffle(waiting_);
    slots_.resize(std::min<size_t>(1 + launch.random(3), waiting_.size()));
    const size_t bytes = slots_.size() * ranks * threads * kStack;
    stacks_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks_ == MAP_FAILED) throw std::bad_alloc();
    stack_bytes_ = bytes;
  }
  ~Scheduler() { munmap(stacks_, stack_bytes_); }

  void run_all() {
    for (size_t i = 0; i < slots_.size(); ++i) start(i);
    while (!live_.empty()) {
      ++launch_.now;
      Block& block = *live_[launch_.random(static_cast<uint32_t>(live_.size()))];
      if (block.slow && !chance(1)) continue;
      std::vector<bool> asleep(block.warps.size());
      for (size_t i = 0; i < asleep.size(); ++i) asleep[i] = chance(4);
      bool ran = false;
      for (uint32_t rounds = 1 + launch_.random(16); rounds > 0 && round(block, asleep); --rounds) ran = true;
      if (chance(launch_.copy_chance)) ran |= copy();
      if (!ran) {  // before it is called a deadlock
        const std::vector<bool> nobody(block.warps.size());
        for (Block* each : live_) ran |= round(*each, nobody);
        if (!ran && !copy()) {
          if (launch_.now >= launch_.latest) throw std::runtime_error("emulated kernel: every thread waits");
          launch_.now = launch_.latest;
        }
      }
      replace();
    }
  }

 private:
  struct Slot {
    std::unique_ptr<Cluster> cluster;
    std::vector<Fiber> fibers;
  };

  template <typename T>
  void shuffle(std::vector<T>& x) {
    for (size_t i = x.size(); i > 1; --i) std::swap(x[i - 1], x[launch_.random(static_cast<uint32_t>(i))]);
  }

  void start(size_t at) {
    Slot& slot = slots_[at];
    const int64_t first = waiting_.back() * ranks_;
    waiting_.pop_back();
    slot.cluster = std::make_unique<Cluster>();
    slot.cluster->barrier.expected = ranks_ * threads_;
    for (int rank = 0; rank < ranks_; ++rank) {
      slot.cluster->blocks.push_back({slot.cluster.get(),
                                      Guarded((shared_bytes_ + 15) / 16 * 16),
                                      {},
                                      {},
                                      first + rank,
                                      rank,
                                      threads_,
                                      chance(8)});
      Block& block = slot.cluster->blocks.back();
      block.warps.resize(threads_ / 32);
      for (Warp& warp : block.warps) warp.barrier.expected = 32;
      block.barrier.expected = threads_;
    }
    slot.fibers = std::vector<Fiber>(static_cast<size_t>(ranks_) * threads_);
    for (size_t i = 0; i < slot.fibers.size(); ++i) {
      Fiber& fiber = slot.fibers[i];
      fiber.block = &slot.cluster->blocks[i / threads_];
      fiber.thread = static_cast<int>(i % threads_);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = static_cast<char*>(stacks_) + (at * slot.fibers.size() + i) * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
    for (Block& block : slot.cluster->blocks) live_.push_back(&block);
  }

  // Once each thread of a block that can run, in a drawn order; whether any could.
  bool round(Block& block, const std::vector<bool>& asleep) {
    Fiber* const fibers = fibers_of(block);
    order_.resize(threads_);
    std::iota(order_.begin(), order_.end(), 0);
    shuffle(order_);
    bool ran = false;
    for (const int i : order_) {
      Fiber& fiber = fibers[i];
      if (fiber.done || asleep[i / 32] || (fiber.ready && !fiber.ready())) continue;
      fiber.ready = nullptr;
      launch_.current = &fiber;
      swapcontext(&launch_.scheduler, &fiber.context);
      launch_.current = nullptr;
      if (!launch_.failure.empty()) throw std::runtime_error("emulated kernel: " + launch_.failure);
      ran = true;
    }
    return ran;
  }

  Fiber* fibers_of(const Block& block) {
    for (Slot& slot : slots_) {
      if (slot.cluster.get() == block.cluster) return slot.fibers.data() + block.rank * threads_;
    }
    throw std::logic_error("a block of no cluster");
  }

  // A part of one pending copy; whether there was one.
  bool copy() {
    std::vector<std::pair<Block*, size_t>> pending;
    for (Block* block : live_) {
      for (size_t i = 0; i < block->copies.size(); ++i) pending.emplace_back(block, i);
    }
    if (pending.empty()) return false;
    const auto [block, i] = pending[launch_.random(static_cast<uint32_t>(pending.size()))];
    if (block->copies[i]()) block->copies.erase(block->copies.begin() + static_cast<std::ptrdiff_t>(i));
    return true;
  }

  // Clusters that came to their end make room for the next.
  void replace() {
    std::erase_if(live_, [](const Block* block) { return block->left == 0; });
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (!slots_[i].cluster) continue;
      bool ended = true;
      for (const Block& block : slots_[i].cluster->blocks) ended &= block.left == 0;
      if (!ended) continue;
      slots_[i].cluster.reset();
      if (!waiting_.empty()) start(i);
    }
  }

  int ranks_, threads_;
  size_t shared_bytes_, stack_bytes_;
  Launch& launch_;
  std::vector<int64_t> waiting_;
  std::vector<Slot> slots_;
  std::vector<Block*> live_;
  std::vector<int> order_;
  void* stacks_;
};

// Runs `blocks` blocks of `threads` threads, `ranks` blocks a cluster.
inline void launch(int64_t blocks, int ranks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  constexpr uint32_t kChances[3] = {0, 4, 16};  // as late as can be, at any time, at once
  Random random(++seed);
  Launch here{{}, nullptr, &kernel, random, {}, 0, 0, blocks};
  here.copy_chance = kChances[here.random(3)];
  here.product_chance = kChances[here.random(3)];
  struct sigaction fault = {}, before = {};
  fault.sa_sigaction = on_fault;
  fault.sa_flags = SA_SIGINFO | SA_NODEFER;
  run = &here;
  Scheduler scheduler(blocks, ranks, threads, shared_bytes, here);
  sigaction(SIGSEGV, &fault, &before);
  try {
    scheduler.run_all();
  } catch (...) {
    sigaction(SIGSEGV, &before, nullptr);
    throw;
  }
  sigaction(SIGSEGV, &before, nullptr);
}

}  // namespace emulator
