// y = gelu(x + bias), tanh form, forward and backward: what the binding (bias_gelu.cpp) and the
// kernels (bias_gelu_kernels.cpp) say to each other.
#pragma once
#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace sora {

struct BiasGelu {
  int64_t tokens, width;
  Tokens x;
  const float* bias;  // [D] or null
  bool stream;        // the output bypasses the cache
};

struct BiasGeluFwd : BiasGelu {
  void* y;  // [N, D]
};

struct BiasGeluBwd : BiasGelu {
  Tokens dy;
  void* dx;  // [N, D]
  VectorGrad dbias;
};

}  // namespace sora

SORA_DECLARE_KERNEL_BF16(bias_gelu_fwd(const sora::BiasGeluFwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(bias_gelu_bwd(const sora::BiasGeluBwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(bias_gelu_bwd_finish(const sora::BiasGeluBwd&, int64_t begin, int64_t end))
