// Row-indexed modulation: which row of a [R, D] matrix a token uses, and the inverse of that map.
// Plain data filled by the bindings, and the arithmetic on it that CPU and CUDA kernels share.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace sora {

// A [R, D] matrix with unit stride along D.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from one row to the next
  DType type = DType::f32;
};

// A [B, L, D] tensor seen as N = B * L tokens of width D, unit stride along D.
struct Tokens {
  const void* data = nullptr;
  int64_t per_batch = 1;     // L
  int64_t batch_stride = 0;  // elements
  int64_t token_stride = 0;
  DType type = DType::f32;
};

// n / d of numbers >= 0. A GPU has no 64-bit division, and takes about a hundred instructions for one.
SORA_HD int64_t quotient(int64_t n, int64_t d) {
  if (n < d) return 0;
  if (((n | d) >> 32) == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  return n / d;
}

template <class T>
SORA_HD const T* token_row(const Tokens& x, int64_t n) {
  const int64_t batch = quotient(n, x.per_batch);
  return static_cast<const T*>(x.data) + batch * x.batch_stride +
         (n - batch * x.per_batch) * x.token_stride;
}

// sora_kernels/rows.py RowMap. Uniform maps have no index: row(n) = n / tokens_per_row.
struct RowMap {
  const int32_t* index = nullptr;    // [N]
  const int32_t* order = nullptr;    // [N], tokens sorted by row; null: already sorted
  const int32_t* offsets = nullptr;  // [R + 1]
  int64_t tokens_per_row = 1;
};

// The gradient [R, D] of a modulation, and the partial sums it is made from; see grouped_sum.h.
struct RowGrad {
  void* result = nullptr;  // null: not wanted
  DType type = DType::f32;
  float* partial = nullptr;  // [blocks, 2, D]; null if every row is one token
};

// The gradient [D] of a vector, over all tokens, on the CPU.
struct VectorGrad {
  float* result = nullptr;   // null: not wanted
  float* partial = nullptr;  // [blocks, D]
};

// Sums over tokens on the CPU: tokens of a block, and columns of a unit of their second stage.
constexpr int64_t kBlockTokens = 32, kColumns = 512;

SORA_HD int64_t row_of(const RowMap& map, int64_t token) {
  return map.index ? map.index[token] : quotient(token, map.tokens_per_row);
}
SORA_HD int64_t token_at(const RowMap& map, int64_t position) {
  return map.order ? map.order[position] : position;
}
SORA_HD int64_t row_begin(const RowMap& map, int64_t row) {
  return map.offsets ? map.offsets[row] : row * map.tokens_per_row;
}

}  // namespace sora
