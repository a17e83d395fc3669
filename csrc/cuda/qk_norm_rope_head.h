// What a thread of qk_norm_rope holds of a head: V pairs, as two runs of V components.
//
// Interleaved, a run is V neighbouring components, and lane l of a group has runs l and l + lanes of
// the head; in halves, the first run is the first components of V pairs, and the second one the others.
// So a run is one 16-byte access, and a rotation never leaves the registers of a thread. Where
// addresses or axes do not allow such accesses, V = 1: a lane has one pair, read by its two components.
#pragma once
#include "launch.h"
#include "law.h"
#include "qk_norm_rope.h"
#include "vectors.h"

namespace sora::cuda {

// Component `second` of pair j. What is not turned is paired as one more half.
SORA_D int column_of(const QkNormRope& a, int j, int second) {
  if (a.pairing == kInterleaved) return 2 * j + second;
  if (j >= a.turned) return second ? j + a.width / 2 : j + a.turned;
  int begin = 0, end = a.turned;  // of the axis that j is on, if every axis has halves of its own
  if (a.pairing == kHalfPerAxis) {
    int axis = 0;
#pragma unroll 1
    while (a.axis_end[axis] <= j) begin = a.axis_end[axis++];
    end = a.axis_end[axis];
  }
  return second ? j + end : j + begin;
}

template <int V>
struct Piece {
  static constexpr int kHalf = V > 1 ? V / 2 : 1;
  int pair[2];    // the first pair of either half of the thread's V
  int column[2];  // the first component of either run
  bool here[2];   // whether the run lies in the head

  __device__ void place(const QkNormRope& a, int lane, int step) {
    const bool neighbours = V > 1 && a.pairing == kInterleaved;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (neighbours) {
        const int run = lane + a.lanes * (2 * step + r);
        pair[r] = run * kHalf;
        column[r] = run * V;
        here[r] = column[r] < a.width;
      } else {
        const int first = (lane + a.lanes * step) * V;
        pair[r] = V > 1 ? first + r * kHalf : first;
        here[r] = 2 * first < a.width;
        column[r] = here[r] ? column_of(a, first, r) : 0;
      }
    }
  }

  // Pair p of the thread's V.
  __device__ int pair_at(int p) const { return pair[p / kHalf] + p % kHalf; }

  template <class T>
  __device__ void fetch(const T* row, Words<T, V> (&words)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      words[r] = {};
      if (here[r]) words[r] = cuda::fetch<T, V>(row + column[r]);
    }
  }

  // row += v, in memory that no other thread touches.
  __device__ void add(float* row, const float (&v)[2][V]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!here[r]) continue;
      float* at = row + column[r];
      if constexpr (V == 1) {
        *at += v[r][0];
      } else {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
          float4& sum = *reinterpret_cast<float4*>(at + i);
          sum = make_float4(sum.x + v[r][i], sum.y + v[r][i + 1], sum.z + v[r][i + 2],
                            sum.w + v[r][i + 3]);
        }
      }
    }
  }
};

// A pair turned by its angle, or (Back) by the negative one. A rounding of the law is the identity to
// the gradient.
template <class T, bool Back>
SORA_D void turn_pair(const QkNormRope& a, float cosine, float sine, float& x, float& y) {
  const float u = x, v = y;
  float uc = u * cosine, us = u * sine, vc = v * cosine, vs = v * sine;
  if constexpr (Back) {
    x = uc + vs;
    y = vc - us;
  } else {
    if (sizeof(T) < 4 && (a.law & kRope)) {
      const T* type = nullptr;
      uc = rounded(uc, type), us = rounded(us, type), vc = rounded(vc, type), vs = rounded(vs, type);
    }
    x = uc - vs;
    y = vc + us;
  }
}

// The V pairs of a piece.
template <class T, int V, bool Back>
SORA_D void turn(const QkNormRope& a, const Piece<V>& piece, const float (&cosine)[V],
                 const float (&sine)[V], float (&v)[2][V]) {
  const bool neighbours = V > 1 && a.pairing == kInterleaved;
#pragma unroll
  for (int p = 0; p < V; ++p) {
    if (piece.pair_at(p) >= a.turned) continue;
    if (neighbours) {
      turn_pair<T, Back>(a, cosine[p], sine[p], v[2 * p / V][2 * p % V],
                            v[2 * p / V][(2 * p + 1) % V]);
    } else {
      turn_pair<T, Back>(a, cosine[p], sine[p], v[0][p], v[1][p]);
    }
  }
}

}  // namespace sora::cuda
