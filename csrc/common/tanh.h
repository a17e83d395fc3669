// tanh of a register of floats, within 2 units in the last place.
#pragma once
#include "vec.h"

namespace sora::SORA_ISA {

inline Vec select(IVec mask, Vec a, Vec b) {
  return (Vec)(((UVec)mask & (UVec)a) | (~(UVec)mask & (UVec)b));
}

// exp(v) for 0 <= v <= 88: v = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series of exp(r).
inline Vec exp_positive(Vec v) {
  const IVec n = __builtin_convertvector(v * splat(1.44269504f) + splat(0.5f), IVec);
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = v - whole * splat(0.693145752f) - whole * splat(1.42860677e-6f);  // ln 2 in two parts
  Vec p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r * r + r + splat(1.0f);
  return p * (Vec)((n + 127) << 23);
}

// Near zero v + v^3 P(v^2), P fitted to least relative error on [0, 0.65]; else 1 - 2 / (e^2v + 1).
inline Vec tanh(Vec v) {
  const UVec sign = (UVec)v & 0x80000000u;
  const Vec a = (Vec)((UVec)v & 0x7fffffffu);
  const Vec z = v * v;
  Vec p = splat(-0.0055286332f);
  p = p * z + splat(0.020483316f);
  p = p * z + splat(-0.053692968f);
  p = p * z + splat(0.133309f);
  p = p * z + splat(-0.33333263f);
  const Vec small = v + v * z * p;
  const Vec bounded = select((IVec)(a < splat(10.0f)), a, splat(10.0f));
  const Vec far = splat(1.0f) - splat(2.0f) / (exp_positive(bounded + bounded) + splat(1.0f));
  const Vec large = (Vec)((UVec)far | sign);
  const Vec result = select((IVec)(a < splat(0.65f)), small, large);
  return select((IVec)(v == v), result, v);  // NaN stays NaN
}

}  // namespace sora::SORA_ISA
