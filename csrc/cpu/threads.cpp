#include "threads.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace vigos::cpu {
namespace {

struct Work {
  std::atomic<int64_t> next{0};
  int64_t n;
  void (*run)(void*, int64_t);
  void* context;
};

void drain(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.n;) work.run(work.context, i);
}

// What a compiler emits for `#pragma omp parallel`; libgomp, LLVM's and Intel's runtimes all export it.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel find_parallel() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

Parallel parallel() {
  static const Parallel found = find_parallel();
  return found;
}

}  // namespace

const char* thread_backend() { return parallel() != nullptr ? "openmp" : "std::thread"; }

void parallel_for(int64_t n, int threads, void (*run)(void*, int64_t), void* context) {
  Work work;
  work.n = n;
  work.run = run;
  work.context = context;
  const int used = static_cast<int>(std::min<int64_t>(threads, n));
  if (used <= 1) {
    drain(&work);
  } else if (Parallel fork = parallel()) {
    fork(drain, &work, static_cast<unsigned>(used), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int i = 1; i < used; ++i) helpers.emplace_back(drain, &work);
    drain(&work);
    for (std::thread& helper : helpers) helper.join();
  }
}

}  // namespace vigos::cpu
