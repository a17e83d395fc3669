// What every call of an op with a norm and a modulation has. No CUDA headers here: bindings are
// compiled by the C++ compiler.
#pragma once
#include "sums.h"

namespace sora::cuda {

struct Normed {
  int64_t tokens;
  int width;
  Tokens x;
  Matrix weight, bias, shift_table, scale_table;  // [D]: stride 0; data may be null
  RowMap rows;
  DType out_type;
  float* mean;  // [N], null for RMS
  float* rstd;  // [N]
  float eps;
  int law;
};

}  // namespace sora::cuda
