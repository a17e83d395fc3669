// CPU binding of bias_gelu: stable-ABI tensors in, row kernels on torch's thread pool.
#include "bias_gelu.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

void fill(BiasGelu& a, const Tensor& x, const Optional& bias,
          std::vector<std::vector<float>>& keep) {
  keep.reserve(1);
  a.x = tokens_of(x, "x");
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.bias = vector_of(bias, a.width, "bias", keep);
  a.stream = static_cast<int64_t>(x.numel() * x.element_size()) >= kStreamBytes;
}

Tensor forward(Tensor x, Optional bias) {
  BiasGeluFwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, bias, keep);
  Tensor y = empty(x, {x.size(0), x.size(1), a.width}, x.scalar_type());
  a.y = data(y);
  torch::stable::parallel_for(0, a.tokens, 1 + 16384 / (a.width + 1), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(bias_gelu_fwd, a, b, e);
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(Tensor dy, Tensor x, Optional bias, bool need_dbias) {
  BiasGeluBwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, bias, keep);
  a.dy = tokens_of(dy, "dy");
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == x.size(1) && dy.size(2) == a.width &&
                      a.dy.type == a.x.type,
                  "sora_kernels: dy: expected the shape and dtype of x");
  const int64_t blocks = (a.tokens + kGeluBlock - 1) / kGeluBlock;
  Tensor dx = empty(x, {x.size(0), x.size(1), a.width}, x.scalar_type());
  Tensor dbias = empty(x, {need_dbias ? a.width : 0}, ScalarType::Float);
  Tensor partial = empty(x, {need_dbias ? blocks : 0, a.width}, ScalarType::Float);
  a.dx = data(dx);
  if (need_dbias) {
    a.dbias = data<float>(dbias);
    a.dbias_partial = data<float>(partial);
  }
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(bias_gelu_bwd, a, b, e);
  });
  if (need_dbias) {
    torch::stable::parallel_for(0, (a.width + kGeluColumns - 1) / kGeluColumns, 1,
                                [&](int64_t b, int64_t e) {
                                  SORA_CALL_KERNEL_BF16(bias_gelu_bwd_finish, a, b, e);
                                });
  }
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&forward));
  m.impl("bias_gelu_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
