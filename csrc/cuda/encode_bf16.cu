// encode's kernels with bf16 products.
#include "encode_launch.h"

namespace writesae::cuda {

Kernel encode_kernel_bf16(int depth, bool topk) { return encode_kernel_of<Precision::bf16>(depth, topk); }

}  // namespace writesae::cuda
