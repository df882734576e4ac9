// encode's kernels with fp32 products.
#include "encode_launch.h"

namespace writesae::cuda {

Kernel encode_kernel_fp32(int depth, bool topk) { return encode_kernel_of<Precision::fp32>(depth, topk); }

}  // namespace writesae::cuda
