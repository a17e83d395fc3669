// y = (1 + scale) * (xhat * weight + bias) + shift, forward and backward: what the binding
// (norm_modulate.cpp) and the kernels (norm_modulate_{fwd,bwd}.cu) say to each other.
#pragma once
#include "norm.h"

namespace sora::cuda {

constexpr int kMaxOutputs = 2;

struct NormModulate : Normed {
  int outputs;
  Matrix shift[kMaxOutputs], scale[kMaxOutputs];  // [R, D]; data may be null
};

struct NormModulateFwd : NormModulate {
  void* y[kMaxOutputs];  // [N, D] of out_type
};

struct NormModulateBwd : NormModulate {
  Tokens dy[kMaxOutputs];  // of out_type
  void* dx;                // null where a gradient is not wanted, like the results below
  GroupedSum dweight, dbias, dshift[kMaxOutputs], dscale[kMaxOutputs];
  float* means;  // [N, 2], memory for rows that no block of threads can hold; see holds_row
};

// Whether one block of threads takes whole rows in the backward; else it needs `means`.
bool holds_row(const NormModulateBwd& a);

void run_forward(const NormModulateFwd& a, Stream stream);
void run_backward(const NormModulateBwd& a, Stream stream);

}  // namespace sora::cuda
