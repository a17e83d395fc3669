// CUDA binding of norm_modulate.
#include "norm_modulate.h"

#include "bind.h"
#include "norm_modulate_call.h"

namespace sora::cuda {
namespace {

class Device : public Cuda {
 public:
  using Forward = NormModulateFwd;
  using Backward = NormModulateBwd;
  using Gradients = cuda::Gradients;
  using Cuda::Cuda;

  void forward(const Forward& a) const { norm_modulate_fwd(a, stream()); }

  void backward(Backward& a, const Gradients&) const {
    const bool whole = norm_modulate_bwd_holds_row(a);
    Tensor means = empty({whole ? 0 : a.tokens, 2}, ScalarType::Float);
    a.means = whole ? nullptr : data<float>(means);
    norm_modulate_bwd(a, stream());
  }
};

}  // namespace

SORA_CUDA_OP(norm_modulate, norm_modulate_forward<Device>, norm_modulate_backward<Device>)

}  // namespace sora::cuda
