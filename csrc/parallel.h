// How kernels spread work over threads, without naming a thread library: the caller hands in its own (torch's pool when
// called from torch), so no second runtime competes for the cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace writesae {

struct Parallel {
  int threads;
  // Runs body(begin, end, context) over parts of [0, n), possibly at once, and returns when all are done.
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// Calls f(item, worker) for every item in [0, n). Items are handed out one by one, because they differ in length.
// `worker` < parallel.threads is unique among the calls running at once. f must not throw.
template <class F>
void for_each(const Parallel& parallel, int64_t n, const F& f) {
  const int64_t workers = n < parallel.threads ? n : parallel.threads;
  if (workers <= 1) {
    for (int64_t i = 0; i < n; i++) f(i, 0);
    return;
  }
  struct Context {
    const F* f;
    std::atomic<int64_t> next{0};
    int64_t n;
  } context;
  context.f = &f;
  context.n = n;
  parallel.run(
      workers,
      [](int64_t begin, int64_t end, void* opaque) {
        Context& c = *static_cast<Context*>(opaque);
        for (int64_t worker = begin; worker < end; worker++)
          for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) (*c.f)(i, worker);
      },
      &context);
}

}  // namespace writesae
