// CUDA binding of gate_residual_norm_modulate.
#include "gate_residual_norm_modulate.h"

#include "bind.h"
#include "gate_residual_norm_modulate_call.h"

namespace sora::cuda {
namespace {

class Device : public Cuda {
 public:
  using Forward = GateResidualNormModulateFwd;
  using Backward = GateResidualNormModulateBwd;
  using Gradients = cuda::Gradients;
  using Cuda::Cuda;

  void forward(const Forward& a) const { gate_residual_norm_modulate_fwd(a, stream()); }

  void backward(Backward& a, const Gradients&) const {
    const bool whole = gate_residual_norm_modulate_bwd_holds_row(a);
    Tensor means = empty({whole ? 0 : a.tokens, 2}, ScalarType::Float);
    a.means = whole ? nullptr : data<float>(means);
    gate_residual_norm_modulate_bwd(a, stream());
  }
};

}  // namespace

SORA_CUDA_OP(gate_residual_norm_modulate, gate_residual_norm_modulate_forward<Device>, gate_residual_norm_modulate_backward<Device>)

}  // namespace sora::cuda
