// From run-time types to template arguments.
#pragma once
#include "dtype.h"

namespace sora::cuda {

// run(in{}, out{}): half precision gives itself, fp32 gives anything.
template <class Run>
void by_type(DType in, DType out, Run run) {
  if (in == DType::bf16) run(bf16{}, bf16{});
  else if (in == DType::f16) run(f16{}, f16{});
  else if (out == DType::bf16) run(float{}, bf16{});
  else if (out == DType::f16) run(float{}, f16{});
  else run(float{}, float{});
}

}  // namespace sora::cuda
