// CPU binding of bias_gelu: stable-ABI tensors in, row kernels on torch's thread pool.
#include "bias_gelu.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

void fill(Cpu& device, BiasGelu& a, const Tensor& x, const Optional& bias) {
  a.x = tokens_of(x, "x");
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.bias = device.vector(bias, a.width, "bias");
  a.stream = past_cache(x);
}

Tensor forward(Tensor x, Optional bias) {
  Cpu device(x);
  BiasGeluFwd a{};
  fill(device, a, x, bias);
  Tensor y = device.empty(shape_of(x), x.scalar_type());
  a.y = data(y);
  torch::stable::parallel_for(0, a.tokens, token_grain(a.width), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(bias_gelu_fwd, a, b, e);
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(Tensor dy, Tensor x, Optional bias, bool need_dbias) {
  Cpu device(x);
  BiasGeluBwd a{};
  fill(device, a, x, bias);
  a.dy = tokens_of(dy, "dy");
  STD_TORCH_CHECK(shape_of(dy) == shape_of(x) && a.dy.type == a.x.type,
                  "sora_kernels: dy: expected the shape and dtype of x");
  Gradients grads(device, a.tokens, a.width, {}, false);
  Tensor dx = grads.tokens(true, x, x.scalar_type(), a.dx);
  Tensor dbias = grads.vector(need_dbias, x, a.dbias);
  torch::stable::parallel_for(0, blocks_of(a.tokens), 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(bias_gelu_bwd, a, b, e);
  });
  grads.finish([&](int64_t b, int64_t e) { SORA_CALL_KERNEL_BF16(bias_gelu_bwd_finish, a, b, e); });
  return {dx, dbias};
}

}  // namespace

SORA_CPU_OP(bias_gelu, forward, backward)

}  // namespace sora
