// Which instruction set the kernels of this process use. Chosen once, by cpuid or by WRITESAE_CPU_ISA. No torch here.
#pragma once

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace writesae::cpu {

enum class Isa : int { portable, avx2, avx512 };

inline const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

inline bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::portable;
}

// "avx512,avx2,portable", best first, as far as this processor goes.
inline std::string isa_list() {
  std::string names;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable})
    if (isa_supported(isa)) names += (names.empty() ? "" : ",") + std::string(isa_name(isa));
  return names;
}

inline Isa parse_isa(const std::string& name, const char* source) {
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (name != isa_name(isa)) continue;
    if (!isa_supported(isa))
      throw std::runtime_error(std::string(source) + "=" + name + ": this processor supports only " + isa_list());
    return isa;
  }
  throw std::runtime_error(std::string(source) + ": expected avx512, avx2 or portable, got \"" + name + "\"");
}

inline std::atomic<int>& isa_slot() {
  static std::atomic<int> slot{-1};
  return slot;
}

inline void force_isa(const std::string& name) { isa_slot() = static_cast<int>(parse_isa(name, "isa")); }

inline Isa isa() {
  int chosen = isa_slot().load(std::memory_order_relaxed);
  if (chosen < 0) {
    const char* forced = std::getenv("WRITESAE_CPU_ISA");
    const std::string best = isa_list();
    chosen = static_cast<int>(forced != nullptr && *forced != 0 ? parse_isa(forced, "WRITESAE_CPU_ISA")
                                                                : parse_isa(best.substr(0, best.find(',')), "isa"));
    isa_slot() = chosen;
  }
  return static_cast<Isa>(chosen);
}

}  // namespace writesae::cpu

// make(set) for the instruction set in use, one of the namespaces that each_isa.h makes; `make` is a macro.
#if defined(__x86_64__)
#define WRITESAE_OF_ISA(make) (isa() == Isa::avx512 ? make(avx512) : isa() == Isa::avx2 ? make(avx2) : make(portable))
#else
#define WRITESAE_OF_ISA(make) (isa(), make(portable))
#endif

// Code between a BEGIN and WRITESAE_TARGET_END is compiled for that instruction set; both must stand at namespace scope,
// after every standard header, which must not be compiled for it.
#if defined(__clang__)
#define WRITESAE_PRAGMA(x) _Pragma(#x)
#define WRITESAE_TARGET_BEGIN_AVX512                                                                                \
  WRITESAE_PRAGMA(clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                                       apply_to = function))
#define WRITESAE_TARGET_BEGIN_AVX2 \
  WRITESAE_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function))
#define WRITESAE_TARGET_END _Pragma("clang attribute pop")
#else
#define WRITESAE_TARGET_BEGIN_AVX512 \
  _Pragma("GCC push_options")        \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512\")")
#define WRITESAE_TARGET_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define WRITESAE_TARGET_END _Pragma("GCC pop_options")
#endif
