// y = (1 + scale) * (xhat * weight + bias) + shift, forward and backward: what the binding
// (norm_modulate.cpp) and the kernels (norm_modulate_kernels.cpp) say to each other.
#pragma once
#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace sora {

constexpr int kMaxOutputs = 2;

struct NormModulate {
  int64_t tokens, width;
  Tokens x;
  const float* weight;  // [D] or null
  const float* bias;
  Matrix shift[kMaxOutputs], scale[kMaxOutputs];  // data may be null
  const float* shift_table;                       // [D] or null
  const float* scale_table;
  RowMap rows;
  int outputs;
  DType out_type;
  float* mean;  // [N], null for RMS
  float* rstd;  // [N]
  float eps;
  int law;
};

struct NormModulateFwd : NormModulate {
  void* y[kMaxOutputs];
  bool stream;  // outputs bypass the cache
};

struct NormModulateBwd : NormModulate {
  Tokens dy[kMaxOutputs];
  void* dx;  // null where a gradient is not wanted, like the results below
  VectorGrad dweight, dbias;
  RowGrad dshift[kMaxOutputs], dscale[kMaxOutputs];
  bool stream;
};

}  // namespace sora

SORA_DECLARE_KERNEL_BF16(norm_modulate_fwd(const sora::NormModulateFwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(norm_modulate_bwd(const sora::NormModulateBwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(norm_modulate_bwd_finish(const sora::NormModulateBwd&, int64_t begin,
                                                  int64_t end))
