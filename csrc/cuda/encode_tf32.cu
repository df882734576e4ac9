// encode's kernels with tf32 products.
#include "encode_launch.h"

namespace writesae::cuda {

Kernel encode_kernel_tf32(int depth, bool topk) { return encode_kernel_of<Precision::tf32>(depth, topk); }

}  // namespace writesae::cuda
