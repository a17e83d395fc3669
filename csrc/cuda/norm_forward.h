// Rows of a norm: one in the registers of a team of threads, or any row, whose numbers are asked for
// once per sum.
#pragma once
#include "modulate.h"
#include "norm.h"
#include "reduce.h"

namespace sora::cuda {

// The token of a team, and the first column of its thread's k-th vector.
SORA_D int64_t team_number() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
template <int V>
SORA_D int team_column(int k) {
  return static_cast<int>(threadIdx.x + k * blockDim.x) * V;
}

SORA_D float write_statistics(const Normed& a, int64_t n, float mean, float square,
                              TeamScratch<1>& scratch) {
  const float inverse = 1.0f / static_cast<float>(a.width);
  const float rstd = 1.0f / sqrtf(team_sum(square, scratch, 1) * inverse + a.eps);
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[n] = mean;
    a.rstd[n] = rstd;
  }
  return rstd;
}

SORA_D float team_mean(const Normed& a, float sum, TeamScratch<1>& scratch) {
  return 1.0f / static_cast<float>(a.width) * team_sum(sum, scratch, 0);
}

// Centres a row, the sum of whose numbers in this thread is given; returns 1 / deviation.
template <int K, int V>
SORA_D float centre_row(const Normed& a, int64_t n, float sum, float (&v)[K][V],
                        TeamScratch<1>& scratch) {
  const float mean = a.mean ? team_mean(a, sum, scratch) : 0.0f;
  float square = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (team_column<V>(k) >= a.width) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[k][i] -= mean;
      square += v[k][i] * v[k][i];
    }
  }
  return write_statistics(a, n, mean, square, scratch);
}

struct RowStatistics {
  float mean, rstd;
};

// The same for value(column) of any row.
template <class Value>
SORA_D RowStatistics row_statistics(const Normed& a, int64_t n, Value value,
                                    TeamScratch<1>& scratch) {
  const int first = threadIdx.x, step = blockDim.x;
  float mean = 0.0f, square = 0.0f;
  if (a.mean) {
    float sum = 0.0f;
    for (int c = first; c < a.width; c += step) sum += value(c);
    mean = team_mean(a, sum, scratch);
  }
  for (int c = first; c < a.width; c += step) {
    const float centred = value(c) - mean;
    square += centred * centred;
  }
  return {mean, write_statistics(a, n, mean, square, scratch)};
}

// V columns of a centred row: xhat * weight + bias.
template <class T, int V, class Law>
SORA_D void normed_columns(const Normed& a, int column, float rstd, Law law, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] *= rstd;
  round_at<T, V>(law, kXhat, v);
  affine<T, V>(a.weight, a.bias, column, law, v);
}

}  // namespace sora::cuda
