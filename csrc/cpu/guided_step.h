// out = x + weight * (uncond + guidance * (cond - uncond)), and its gradients: what the binding
// (guided_step.cpp) and the kernels (guided_step_kernels.cpp) say to each other.
#pragma once
#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace sora {

struct GuidedStep {
  int64_t tokens, width;
  const float* guidance;  // [R]
  const float* weight;    // [R]
  RowMap rows;
  bool stream;  // outputs bypass the cache
};

struct GuidedStepFwd : GuidedStep {
  Tokens x, cond;
  Tokens uncond;  // data may be null: the velocity is cond
  void* out;      // [N, D] of x's type
};

struct GuidedStepBwd : GuidedStep {
  Tokens dout;
  DType type;     // of the velocities
  void* dcond;    // [N, D]; null where a gradient is not wanted
  void* duncond;  // the same
  bool guided;
};

}  // namespace sora

SORA_DECLARE_KERNEL_BF16(guided_step_fwd(const sora::GuidedStepFwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(guided_step_bwd(const sora::GuidedStepBwd&, int64_t begin, int64_t end))
