// silu(u) = u * sigmoid(u) of a register of floats, and its derivative.
#pragma once
#include "tanh.h"

namespace sora::SORA_ISA {

#if defined(__AVX512F__)
// 1 / (1 + exp(-u)) without a division: exp by its Taylor series with fused multiply-adds (|r| <=
// ln 2 / 2), the reciprocal by one Newton step from 14 bits.
inline Vec sigmoid(Vec u) {
  const __m512 v = _mm512_min_ps(
      _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), (__m512)u), _mm512_set1_ps(-87.0f)),
      _mm512_set1_ps(87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), v);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512 d = _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f));
  const __m512 q = _mm512_rcp14_ps(d);
  return (Vec)_mm512_fmadd_ps(_mm512_fnmadd_ps(d, q, _mm512_set1_ps(1.0f)), q, q);
}
#else
// 1 / (1 + exp(-u)), by q = 1 / (1 + exp(|u|)) so that nothing overflows or cancels.
inline Vec sigmoid(Vec u) {
  const Vec a = (Vec)((UVec)u & 0x7fffffffu);
  const Vec bounded = select((IVec)(a < splat(87.0f)), a, splat(87.0f));
  const Vec q = splat(1.0f) / (splat(1.0f) + exp_positive(bounded));
  return select((IVec)(u < Vec{}), q, splat(1.0f) - q);
}
#endif

inline Vec silu(Vec u) { return u * sigmoid(u); }

inline Vec silu_derivative(Vec u) {
  const Vec s = sigmoid(u);
  return s * (splat(1.0f) + u * (splat(1.0f) - s));
}

}  // namespace sora::SORA_ISA
