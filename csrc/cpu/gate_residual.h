// out = x + act(gate) * (norm(y) * weight), forward and backward: what the binding
// (gate_residual.cpp) and the kernels (gate_residual_kernels.cpp) say to each other.
#pragma once
#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace sora {

enum class BranchNorm : int { none = 0, rms = 1, layer = 2 };

struct GateResidual {
  int64_t tokens, width;
  Tokens y;  // data null in a backward that does not read it
  DType x_type;
  Matrix gate;              // data may be null
  const float* gate_table;  // [D] or null
  const float* weight;
  RowMap rows;
  bool tanh;
  BranchNorm norm;
  float* mean;  // [N]; null unless LayerNorm
  float* rstd;  // [N]; null without a norm
  float eps;
  int law;
  bool stream;  // outputs bypass the cache
};

struct GateResidualFwd : GateResidual {
  Tokens x;
  void* out;  // [N, D] of x_type
};

struct GateResidualBwd : GateResidual {
  Tokens dout;  // of x_type
  void* dy;     // [N, D] of y's type; null where a gradient is not wanted
  RowGrad dgate;
  VectorGrad dweight;
};

}  // namespace sora

SORA_DECLARE_KERNEL(gate_residual_fwd(const sora::GateResidualFwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL(gate_residual_bwd(const sora::GateResidualBwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL(gate_residual_bwd_finish(const sora::GateResidualBwd&, int64_t begin,
                                             int64_t end))
