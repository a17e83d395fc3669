// CPU binding of norm_modulate: row kernels on torch's thread pool.
#include "norm_modulate.h"

#include "bind.h"
#include "norm_modulate_call.h"

namespace sora {
namespace {

struct Kernels {
  using Forward = NormModulateFwd;
  using Backward = NormModulateBwd;

  static void forward(const Forward& a, int64_t begin, int64_t end) {
    SORA_CALL_KERNEL_BF16(norm_modulate_fwd, a, begin, end);
  }
  static void backward(const Backward& a, int64_t begin, int64_t end) {
    SORA_CALL_KERNEL_BF16(norm_modulate_bwd, a, begin, end);
  }
  static void finish(const Backward& a, int64_t begin, int64_t end) {
    SORA_CALL_KERNEL_BF16(norm_modulate_bwd_finish, a, begin, end);
  }
  static bool past_cache(const Backward& a, int64_t numbers) {
    return a.dx && sora::past_cache(numbers, a.x.type);
  }
};
using Device = NormDevice<Kernels>;

}  // namespace

SORA_CPU_OP(norm_modulate, norm_modulate_forward<Device>, norm_modulate_backward<Device>)

}  // namespace sora
