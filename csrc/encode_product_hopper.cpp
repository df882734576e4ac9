// encode_product on tensors: checks and allocation. CUDA only, and only by name: see docs/hopper.md.
#include "encode_product_hopper.h"

#include <string>

#include "operators.h"
#include "tensors.h"

namespace writesae {

#if WRITESAE_SIDE != 0

Tensor encode_product(Tensor v, Tensor left, std::string kernel, int64_t cluster) {
  const char* op = "encode_product";
  STD_TORCH_CHECK(kernel == "hopper" || kernel == "hopper ping-pong", op,
                  ": kernel must be \"hopper\" or \"hopper ping-pong\", got \"", kernel, "\"");
  STD_TORCH_CHECK(cluster == 1 || cluster == 2, op, ": cluster must be 1 or 2 blocks, got ", cluster);
  const auto check = [&](const char* name, const Tensor& x) {
    check_side(op, name, x);
    check_dtype(op, name, x, ScalarType::BFloat16);
    STD_TORCH_CHECK(x.dim() == 2, op, ": ", name, " must have two axes, got ", x.dim());
    STD_TORCH_CHECK(x.stride(1) == 1, op, ": the last axis of ", name, " must have stride 1, got ", x.stride(1));
  };
  check("v", v);
  check("left", left);
  STD_TORCH_CHECK(v.size(1) == left.size(1), op, ": v must be [F, K] and left [T, K], got K = ", v.size(1), " and ",
                  left.size(1));
  STD_TORCH_CHECK(v.size(1) >= 1 && v.size(1) <= cuda::PRODUCT_MAX_K, op, ": K must be from 1 to ", cuda::PRODUCT_MAX_K,
                  ", got ", v.size(1));
  STD_TORCH_CHECK(v.size(0) < (int64_t{1} << 30) && left.size(0) < (int64_t{1} << 30), op,
                  ": F and T must be below 2^30, got ", v.size(0), " and ", left.size(0));
#if WRITESAE_SIDE == 1
  STD_TORCH_CHECK(v.get_device_index() == left.get_device_index(), op, ": v and left must be on one device");
#endif
  const OnDeviceOf device(v);
  Tensor out = empty({v.size(0), left.size(0)}, ScalarType::Float);
  const EncodeProductParams p = {v.size(0),   left.size(0),   v.size(1),  v.const_data_ptr(), left.const_data_ptr(),
                                 v.stride(0), left.stride(0), floats(out)};
  cuda::encode_product_hopper(p, kernel == "hopper ping-pong", static_cast<int>(cluster), stream());
  return out;
}

#endif

}  // namespace writesae
