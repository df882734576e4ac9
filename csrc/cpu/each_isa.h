// Compiles the kernel header WRITESAE_KERNEL for every instruction set: namespaces avx512 and avx2 on x86, portable
// everywhere, each with a simd.h of its own. No include guard on purpose: define WRITESAE_KERNEL and include this where the
// namespaces shall stand, after isa.h and every other header, once a source file.

#if defined(__x86_64__)
WRITESAE_TARGET_BEGIN_AVX512
namespace avx512 {
#define WRITESAE_LANES 16
#include "cpu/simd.h"

#include WRITESAE_KERNEL
#undef WRITESAE_LANES
}  // namespace avx512
WRITESAE_TARGET_END

WRITESAE_TARGET_BEGIN_AVX2
namespace avx2 {
#define WRITESAE_LANES 8
#include "cpu/simd.h"

#include WRITESAE_KERNEL
#undef WRITESAE_LANES
}  // namespace avx2
WRITESAE_TARGET_END
#endif

namespace portable {
#define WRITESAE_LANES 4
#include "cpu/simd.h"

#include WRITESAE_KERNEL
#undef WRITESAE_LANES
}  // namespace portable
#undef WRITESAE_KERNEL
