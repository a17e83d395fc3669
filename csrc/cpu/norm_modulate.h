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
  bool rms;
  int law;
};

struct NormModulateFwd : NormModulate {
  void* y[kMaxOutputs];
  bool stream;  // outputs bypass the cache
};

struct NormModulateBwd : NormModulate {
  Tokens dy[kMaxOutputs];
  void* dx;  // null where a gradient is not wanted
  float* dweight_partial;  // [blocks, D]
  float* dbias_partial;
  void* dshift[kMaxOutputs];
  void* dscale[kMaxOutputs];
  float* dshift_partial[kMaxOutputs];  // [blocks, 2, D]
  float* dscale_partial[kMaxOutputs];
  DType shift_type[kMaxOutputs], scale_type[kMaxOutputs];
  float* dweight;
  float* dbias;
  bool stream;
};

constexpr int64_t kNormModulateBlock = 32;    // tokens per block of the backward
constexpr int64_t kNormModulateColumns = 512;  // columns per unit of its second stage

}  // namespace sora

SORA_DECLARE_KERNEL_BF16(norm_modulate_fwd(const sora::NormModulateFwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(norm_modulate_bwd(const sora::NormModulateBwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(norm_modulate_bwd_finish(const sora::NormModulateBwd&, int64_t begin,
                                                  int64_t end))
