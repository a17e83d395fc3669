// CUDA binding of gate_residual_norm_modulate.
#include "gate_residual_norm_modulate.h"

#include "bind.h"
#include "gate_residual_norm_modulate_call.h"

namespace sora::cuda {
namespace {

using Device = NormDevice<GateResidualNormModulateFwd, GateResidualNormModulateBwd>;

}  // namespace

SORA_CUDA_OP(gate_residual_norm_modulate, gate_residual_norm_modulate_forward<Device>,
             gate_residual_norm_modulate_backward<Device>)

}  // namespace sora::cuda
