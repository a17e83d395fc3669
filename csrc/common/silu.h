// silu(u) = u * sigmoid(u) of a register of floats, and its derivative.
#pragma once
#include "tanh.h"

namespace sora::SORA_ISA {

// 1 / (1 + exp(-u)), by q = 1 / (1 + exp(|u|)) so that nothing overflows or cancels.
inline Vec sigmoid(Vec u) {
  const Vec a = (Vec)((UVec)u & 0x7fffffffu);
  const Vec bounded = select((IVec)(a < splat(87.0f)), a, splat(87.0f));
  const Vec q = splat(1.0f) / (splat(1.0f) + exp_positive(bounded));
  return select((IVec)(u < Vec{}), q, splat(1.0f) - q);
}

inline Vec silu(Vec u) { return u * sigmoid(u); }

inline Vec silu_derivative(Vec u) {
  const Vec s = sigmoid(u);
  return s * (splat(1.0f) + u * (splat(1.0f) - s));
}

}  // namespace sora::SORA_ISA
