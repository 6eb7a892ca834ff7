// One pool of threads: torch's.
#pragma once

#include <cstdint>

namespace vigos::cpu {

// Calls run(context, i) for every i < n from at most `threads` threads. Tasks are handed out as threads become free, so
// a result must not depend on who ran what. Uses the OpenMP runtime that is loaded already (torch's): a second one
// would bring a pool of its own, whose threads fight the spinning ones of the first. Without one it starts plain
// threads. at::parallel_for would do the same, but needs torch's headers, and with them a build for each torch.
void parallel_for(int64_t n, int threads, void (*run)(void*, int64_t), void* context);

template <typename F>
void parallel_for(int64_t n, int threads, F&& f) {
  parallel_for(n, threads, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
}

// "openmp" or "std::thread": what parallel_for runs on.
const char* thread_backend();

}  // namespace vigos::cpu
