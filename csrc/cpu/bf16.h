// What multiplies bfloat16 operands where that is asked for: AMX tiles, AVX-512's dot product of pairs, or, on any other
// processor, rounded operands in float32 (slower than not rounding at all). Chosen at run time, or by WRITESAE_CPU_BF16.
#pragma once

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define WRITESAE_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define WRITESAE_AMX 0
#endif

namespace writesae::cpu {

// tiles: the AMX code on tiles made of plain loops, so that it can be tested on any processor. Never chosen by itself.
enum class Bf16 : int { rounded, tiles, avx512_bf16, amx };

inline const char* bf16_name(Bf16 unit) {
  constexpr const char* names[] = {"rounded", "tiles", "avx512_bf16", "amx"};
  return names[static_cast<int>(unit)];
}

// Whether the processor has AMX and the system lets this process use it, which Linux wants to be asked for.
inline bool amx_granted() {
#if WRITESAE_AMX
  static const bool granted = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0) return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

inline bool bf16_supported(Bf16 unit) {
  if (unit == Bf16::rounded || unit == Bf16::tiles) return true;
#if defined(__x86_64__)
  if (!isa_supported(Isa::avx512)) return false;
  return unit == Bf16::amx ? amx_granted() : static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

// "amx,avx512_bf16,rounded", best first, as far as this processor goes.
inline std::string bf16_list() {
  std::string names;
  for (Bf16 unit : {Bf16::amx, Bf16::avx512_bf16, Bf16::rounded})
    if (bf16_supported(unit)) names += (names.empty() ? "" : ",") + std::string(bf16_name(unit));
  return names;
}

inline std::atomic<int>& bf16_slot() {
  static std::atomic<int> slot{-1};
  return slot;
}

inline Bf16 parse_bf16(const std::string& name, const char* source) {
  for (Bf16 unit : {Bf16::amx, Bf16::avx512_bf16, Bf16::tiles, Bf16::rounded}) {
    if (name != bf16_name(unit)) continue;
    if (!bf16_supported(unit))
      throw std::runtime_error(std::string(source) + "=" + name + ": this processor supports only " + bf16_list());
    return unit;
  }
  throw std::runtime_error(std::string(source) + ": expected amx, avx512_bf16, tiles or rounded, got \"" + name + "\"");
}

// "best" goes back to the processor's own.
inline void force_bf16(const std::string& name) {
  bf16_slot() = static_cast<int>(parse_bf16(name == "best" ? bf16_list().substr(0, bf16_list().find(',')) : name, "bf16"));
}

inline Bf16 bf16() {
  int chosen = bf16_slot().load(std::memory_order_relaxed);
  if (chosen < 0) {
    const char* forced = std::getenv("WRITESAE_CPU_BF16");
    if (forced != nullptr && *forced != 0) {
      bf16_slot() = static_cast<int>(parse_bf16(forced, "WRITESAE_CPU_BF16"));
    } else {
      force_bf16("best");
    }
    chosen = bf16_slot();
  }
  const Bf16 unit = static_cast<Bf16>(chosen);
  // Where the kernels are held to another instruction set, these go with them.
  return unit > Bf16::tiles && isa() != Isa::avx512 ? Bf16::rounded : unit;
}

}  // namespace writesae::cpu

#if defined(__clang__)
#define WRITESAE_TARGET_BEGIN_AVX512_BF16 \
  WRITESAE_PRAGMA(clang attribute push(   \
      __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function))
#define WRITESAE_TARGET_BEGIN_AMX       \
  WRITESAE_PRAGMA(clang attribute push( \
      __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function))
#else
#define WRITESAE_TARGET_BEGIN_AVX512_BF16 \
  _Pragma("GCC push_options")             \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512\")")
#define WRITESAE_TARGET_BEGIN_AMX \
  _Pragma("GCC push_options")     \
      _Pragma("GCC target(\"amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512\")")
#endif
