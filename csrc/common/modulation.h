// Roundings of a law, and modulation rows as fp32 rows. Used by the kernels of modulated ops.
#pragma once
#include <cstdint>

#include "grouped_sum.h"
#include "law.h"
#include "rows.h"
#include "tanh.h"
#include "vec.h"

namespace sora::SORA_ISA {

// Rounds to the precision of T at the points of a law; with Law = false every call is the identity
// and costs nothing.
template <class T, bool Law>
struct Round {
  int law;
  Vec operator()(Vec v, int point) const {
    if constexpr (Law) {
      if (law & point) return round_to(v, static_cast<const T*>(nullptr));
    }
    return v;
  }
};

// Row `row` of m plus its table, as fp32: m's own memory if nothing is to be done, else `out`.
template <class Rounding>
inline const float* modulation_row(const Matrix& m, const float* table, int64_t row, int64_t width,
                                   Rounding round, float* out) {
  if (m.type == DType::f32 && !table) return static_cast<const float*>(m.data) + row * m.stride;
  load_f32(m, row, width, out);
  if (table)
    for_row(width, [&](int64_t d, auto io) {
      io.put(out + d, round(io.get(out + d) + io.get(table + d), kTable));
    });
  return out;
}

// The same, through tanh; 1 - tanh^2 (of the unrounded tanh) goes to `slope` if that is wanted.
template <class Rounding>
inline const float* tanh_row(const Matrix& m, const float* table, int64_t row, int64_t width,
                             Rounding round, float* out, float* slope) {
  const float* in = modulation_row(m, table, row, width, round, out);
  for_row(width, [&](int64_t d, auto io) {
    const Vec t = tanh(io.get(in + d));
    if (slope) io.put(slope + d, splat(1.0f) - t * t);
    io.put(out + d, round(t, kTanh));
  });
  return out;
}

// 1 + scale.
template <class Rounding>
inline const float* one_plus_row(const Matrix& m, const float* table, int64_t row, int64_t width,
                                 Rounding round, float* out) {
  const float* in = modulation_row(m, table, row, width, round, out);
  for_row(width, [&](int64_t d, auto io) {
    io.put(out + d, round(io.get(in + d) + splat(1.0f), kOnePlus));
  });
  return out;
}

// Stores to `out`, past the cache if `past_cache`; the caller has checked the row's alignment.
template <class T>
inline void emit(T* out, Vec v, bool past_cache, Full) {
  if (past_cache) stream(out, v);
  else store(out, v);
}
template <class T>
inline void emit(T* out, Vec v, bool, Tail io) {
  io.put(out, v);
}

}  // namespace sora::SORA_ISA
