// Roundings of a law, norms and modulations of V neighbouring numbers; the formulas and the order of
// evaluation are those of csrc/common/modulation.h and of the references.
#pragma once
#include "law.h"
#include "vectors.h"

namespace sora::cuda {

// A law, where the type that it rounds to is known at run time only; else it is an int.
struct TypedLaw {
  int points;
  DType type;
};

// Rounds to T if the law has this point: one branch, the same for all threads.
template <class T, int V>
SORA_D void round_at(int law, int point, float (&v)[V]) {
  if constexpr (sizeof(T) < 4) {
    if (law & point) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = rounded(v[i], static_cast<const T*>(nullptr));
    }
  }
}
template <class, int V>
SORA_D void round_at(TypedLaw law, int point, float (&v)[V]) {
  if (law.type == DType::bf16) round_at<bf16, V>(law.points, point, v);
  else if (law.type == DType::f16) round_at<f16, V>(law.points, point, v);
}

// A modulation plus its table.
template <class T, int V, class Law>
SORA_D void modulation(const Matrix& m, const Matrix& table, int64_t row, int column, Law law,
                       float (&out)[V]) {
  load<V>(m, row, column, out);
  if (table.data) {
    float add[V];
    load<V>(table, 0, column, add);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] += add[i];
    round_at<T, V>(law, kTable, out);
  }
}

// 1 + scale.
template <class T, int V, class Law>
SORA_D void one_plus(const Matrix& m, const Matrix& table, int64_t row, int column, Law law,
                     float (&out)[V]) {
  modulation<T, V>(m, table, row, column, law, out);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] += 1.0f;
  round_at<T, V>(law, kOnePlus, out);
}

// xhat * weight + bias, of a rounded xhat.
template <class T, int V, class Law>
SORA_D void affine(const Matrix& weight, const Matrix& bias, int column, Law law, float (&v)[V]) {
  float row[V];
  if (weight.data) {
    load<V>(weight, 0, column, row);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] *= row[i];
  }
  if (bias.data) {
    load<V>(bias, 0, column, row);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += row[i];
  }
  round_at<T, V>(law, kAffine, v);
}

// normed * (1 + scale) + shift; the store is the rounding of the sum.
template <class T, int V, class Law>
SORA_D void modulate(const Matrix& scale, const Matrix& scale_table, const Matrix& shift,
                     const Matrix& shift_table, int64_t row, int column, Law law, float (&v)[V]) {
  float m[V];
  if (scale.data) {
    one_plus<T, V>(scale, scale_table, row, column, law, m);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] *= m[i];
    round_at<T, V>(law, kProduct, v);
  }
  if (shift.data) {
    modulation<T, V>(shift, shift_table, row, column, law, m);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += m[i];
  }
}

}  // namespace sora::cuda
