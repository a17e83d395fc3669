// r = x + gate * y (+ gate2 * y2) and (1 + scale) * (norm(r) * weight + bias) + shift, forward and
// backward: what the binding and the kernels say to each other.
#pragma once
#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace sora {

constexpr int kMaxBranches = 2;

struct GateResidualNormModulate {
  int64_t tokens, width;
  // Forward: the residual stream. Backward: the same if the branches are given, which are then
  // added again; else the residual as the forward stored it.
  Tokens x;
  Tokens y[kMaxBranches];  // data may be null
  DType y_type, out_type;
  Matrix gate[kMaxBranches], shift, scale;  // data may be null
  const float *gate_table[kMaxBranches], *shift_table, *scale_table;  // [D] or null
  const float *weight, *bias;
  RowMap rows;
  float* mean;  // [N], null for RMS
  float* rstd;  // [N]
  float eps;
  int law;
  bool stream;  // outputs bypass the cache
};

struct GateResidualNormModulateFwd : GateResidualNormModulate {
  void* residual;  // [N, D] of x's type
  void* normed;    // [N, D] of out_type
};

struct GateResidualNormModulateBwd : GateResidualNormModulate {
  Tokens dresidual;  // of x's type; data may be null
  Tokens dnormed;    // of out_type
  void* dx;          // null where a gradient is not wanted, like all below
  void* dy[kMaxBranches];
  RowGrad dgate[kMaxBranches], dshift, dscale;
  VectorGrad dweight, dbias;
};

}  // namespace sora

SORA_DECLARE_KERNEL(gate_residual_norm_modulate_fwd(const sora::GateResidualNormModulateFwd&,
                                                    int64_t begin, int64_t end))
SORA_DECLARE_KERNEL(gate_residual_norm_modulate_bwd(const sora::GateResidualNormModulateBwd&,
                                                    int64_t begin, int64_t end))
SORA_DECLARE_KERNEL(gate_residual_norm_modulate_bwd_finish(const sora::GateResidualNormModulateBwd&,
                                                           int64_t begin, int64_t end))
