// CPU binding of gate_residual_norm_modulate: row kernels on torch's thread pool.
#include "gate_residual_norm_modulate.h"

#include "bind.h"
#include "gate_residual_norm_modulate_call.h"

namespace sora {
namespace {

struct Kernels {
  using Forward = GateResidualNormModulateFwd;
  using Backward = GateResidualNormModulateBwd;

  static void forward(const Forward& a, int64_t begin, int64_t end) {
    SORA_CALL_KERNEL(gate_residual_norm_modulate_fwd, a, begin, end);
  }
  static void backward(const Backward& a, int64_t begin, int64_t end) {
    SORA_CALL_KERNEL(gate_residual_norm_modulate_bwd, a, begin, end);
  }
  static void finish(const Backward& a, int64_t begin, int64_t end) {
    SORA_CALL_KERNEL(gate_residual_norm_modulate_bwd_finish, a, begin, end);
  }
  static bool past_cache(const Backward& a, int64_t numbers) {
    return (a.dx && sora::past_cache(numbers, a.x.type)) ||
           ((a.dy[0] || a.dy[1]) && sora::past_cache(numbers, a.y_type));
  }
};
using Device = NormDevice<Kernels>;

}  // namespace

SORA_CPU_OP(gate_residual_norm_modulate, gate_residual_norm_modulate_forward<Device>,
            gate_residual_norm_modulate_backward<Device>)

}  // namespace sora
