// sigmoid(u) = 1 / (1 + exp(-u)) of a register of floats, and 1 - sigmoid(u), in which nothing cancels.
#pragma once
#include "pair.h"
#include "tanh.h"

namespace sora::SORA_ISA {

struct Gate {
  Vec s, rest;  // s and 1 - s
};

// gate_of(kExponent * u) is the gate of u: a factor that a caller may merge into its own.
#if defined(__AVX512F__)
// e = exp(-u) = 2^v as 2^floor(v) times a polynomial of the fraction, fitted to least relative error
// on [0, 1] (7.5e-8); s = 1 / (1 + e) by one Newton step from 14 bits, whose residual 1 - q - q e is
// free of the rounding of 1 + e. These are 16 execution slots, where a division alone is 20. 2^126
// bounds e: its reciprocal is still a number.
constexpr float kExponent = -1.44269504f;
inline Gate gate_of(Vec scaled) {
  const __m512 v = _mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)scaled);
  const __m512 t = _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.00187757669f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.00898933969f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.0558263175f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.240153611f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.693153083f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.99999994f));
  const __m512 e = _mm512_scalef_ps(p, v), one = _mm512_set1_ps(1.0f);
  const __m512 q = _mm512_rcp14_ps(_mm512_add_ps(e, one));
  const __m512 residual = _mm512_fnmadd_ps(e, q, _mm512_sub_ps(one, q));
  const __m512 s = _mm512_fmadd_ps(residual, q, q);
  return {(Vec)s, (Vec)_mm512_mul_ps(e, s)};
}
#else
constexpr float kExponent = 1.0f;
inline Gate gate_of(Vec u) {  // from the smaller of the two
  const Vec a = (Vec)((UVec)u & 0x7fffffffu);
  const Vec bounded = select((IVec)(a < splat(87.0f)), a, splat(87.0f));
  const Vec small = splat(1.0f) / (splat(1.0f) + exp_positive(bounded));
  const Vec large = splat(1.0f) - small;
  const IVec negative = (IVec)(u < Vec{});
  return {select(negative, small, large), select(negative, large, small)};
}
#endif
inline Gate gate(Vec u) { return gate_of(u * splat(kExponent)); }

inline Vec silu(Vec u) { return u * gate(u).s; }
inline Pair silu(Pair u) { return {silu(u.a), silu(u.b)}; }

// s + u s (1 - s)
inline Vec silu_slope(Vec u) {
  const Gate g = gate(u);
  return mul_add(u * g.s, g.rest, g.s);
}
inline Pair silu_slope(Pair u) { return {silu_slope(u.a), silu_slope(u.b)}; }

}  // namespace sora::SORA_ISA
