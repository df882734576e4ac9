// What the C++ checks share: a thread pool stand-in, random numbers, exactly sized buffers (so that the address sanitizer
// sees the first element past an end), and comparison.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "element.h"
#include "parallel.h"

namespace writesae::test {

inline Parallel threads(int count) {
  return {count, [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
            std::vector<std::thread> pool;
            for (int64_t i = 0; i < n; i++) pool.emplace_back([=] { body(i, i + 1, context); });
            for (auto& thread : pool) thread.join();
          }};
}

// Numbers of threads to check with; an emulator takes its time over each.
inline std::vector<int> thread_counts() {
#ifdef WRITESAE_QUICK
  return {3};
#else
  return {1, 3};
#endif
}

inline std::mt19937& generator() {
  static std::mt19937 g(0);
  return g;
}

inline std::vector<float> normal(int64_t n, float scale = 1) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> x(n);
  for (float& value : x) value = distribution(generator());
  return x;
}

inline std::vector<float> poison(int64_t n) { return std::vector<float>(n, std::numeric_limits<float>::quiet_NaN()); }

inline View view(const std::vector<float>& x, int64_t a, int64_t b, int64_t c, int64_t d) {
  View out;
  out.data = x.data();
  out.stride[0] = a, out.stride[1] = b, out.stride[2] = c, out.stride[3] = d;
  return out;
}

// Relative RMS error; NaN anywhere fails.
inline void expect_close(const std::string& what, const std::vector<float>& got, const std::vector<double>& expected,
                         double tolerance = 2e-5) {
  double error = 0, total = 1e-60;
  for (size_t i = 0; i < expected.size(); i++) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    total += expected[i] * expected[i];
  }
  const double rms = std::sqrt(error / total);
  if (got.size() == expected.size() && rms <= tolerance) return;
  std::fprintf(stderr, "%s: relative RMS error %.3e, allowed %.0e\n", what.c_str(), rms, tolerance);
  std::exit(1);
}

// Calls f once for each instruction set this processor has.
template <class F>
void each_isa(const F& f) {
  std::string names = cpu::isa_list() + ",";
  for (size_t at = 0, comma; (comma = names.find(',', at)) != std::string::npos; at = comma + 1) {
    cpu::force_isa(names.substr(at, comma - at));
    f(names.substr(at, comma - at));
  }
}

}  // namespace writesae::test
