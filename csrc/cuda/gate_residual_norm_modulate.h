// r = x + gate * y (+ gate2 * y2) and (1 + scale) * (norm(r) * weight + bias) + shift, forward and
// backward: what the binding and the kernels say to each other.
#pragma once
#include "norm.h"

namespace sora::cuda {

constexpr int kMaxBranches = 2;

// x in the forward: the residual stream. In the backward: the same if the branches are given, which are
// then added again; else the residual as the forward stored it.
struct GateResidualNormModulate : Normed {
  Tokens y[kMaxBranches];  // data may be null
  DType y_type;
  Matrix gate[kMaxBranches], shift, scale;  // [R, D]; data may be null
  Matrix gate_table[kMaxBranches];          // [D]: stride 0
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
  GroupedSum dgate[kMaxBranches], dshift, dscale, dweight, dbias;
  float* means;  // [N, 2], memory for rows that no block of threads can hold
};

// Whether one block of threads takes whole rows in the backward; else it needs `means`.
bool holds_row(const GateResidualNormModulateBwd& a);

void run_forward(const GateResidualNormModulateFwd& a, Stream stream);
void run_backward(const GateResidualNormModulateBwd& a, Stream stream);

}  // namespace sora::cuda
