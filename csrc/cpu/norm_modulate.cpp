// CPU binding of norm_modulate: row kernels on torch's thread pool.
#include "norm_modulate.h"

#include "bind.h"
#include "norm_modulate_call.h"

namespace sora {
namespace {

class Device : public Cpu {
 public:
  using Forward = NormModulateFwd;
  using Backward = NormModulateBwd;
  using Gradients = sora::Gradients;
  using Cpu::Cpu;

  void forward(Forward& a) const {
    a.stream = past_cache(a.tokens * a.width, a.out_type);
    torch::stable::parallel_for(0, a.tokens, token_grain(a.width), [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(norm_modulate_fwd, a, b, e);
    });
  }

  void backward(Backward& a, const Gradients& grads) const {
    const int64_t numbers = a.tokens * a.width;
    a.stream = a.dx && past_cache(numbers, a.x.type);
    torch::stable::parallel_for(0, blocks_of(a.tokens), 1, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(norm_modulate_bwd, a, b, e);
    });
    grads.finish([&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(norm_modulate_bwd_finish, a, b, e);
    });
  }
};

}  // namespace

SORA_CPU_OP(norm_modulate, norm_modulate_forward<Device>, norm_modulate_backward<Device>)

}  // namespace sora
