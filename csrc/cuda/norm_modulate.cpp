// CUDA binding of norm_modulate.
#include "norm_modulate.h"

#include "bind.h"
#include "norm_modulate_call.h"

namespace sora::cuda {
namespace {

using Device = NormDevice<NormModulateFwd, NormModulateBwd>;

}  // namespace

SORA_CUDA_OP(norm_modulate, norm_modulate_forward<Device>, norm_modulate_backward<Device>)

}  // namespace sora::cuda
