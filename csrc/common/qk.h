// Codes of qk_norm_rope, and where heads lie.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sora {

constexpr int kMaxAxes = 4;

// The values are those of Norm and Pairing in ops/qk_norm_rope/raw.py.
enum QkNorm : int { kNoNorm = 0, kRms = 1, kLayer = 2, kRmsFull = 3 };
enum QkPairing : int { kInterleaved = 0, kHalf = 1, kHalfPerAxis = 2 };

// [B, L, H, D] with unit stride along D.
struct Heads {
  const void* data = nullptr;
  int64_t per_batch = 1;  // L
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// n / d of token numbers below 2^31. A 64-bit division is a call on a GPU, and spills around it.
SORA_HD int64_t token_quotient(int64_t n, int64_t d) {
  return n < d ? 0 : static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
}

// Elements before token n, of fewer than 2^31.
SORA_HD int64_t token_offset(const Heads& x, int64_t n) {
  const int64_t batch = token_quotient(n, x.per_batch);
  return batch * x.batch_stride + (n - batch * x.per_batch) * x.token_stride;
}

}  // namespace sora
