// Norm and rotation of q and k: what the binding (qk_norm_rope.cpp) and the kernels
// (qk_norm_rope_kernels.cpp) say to each other. The formula is in ops/qk_norm_rope/reference.py.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "grid.h"
#include "isa.h"
#include "qk.h"
#include "rows.h"

namespace sora {

struct QkSide {
  int64_t tokens, heads;
  Heads x;
  const float* weight;  // [D] or [H * D], or null
  const float* bias;    // [D] or null
  void* y;              // forward: [packed tokens, H, D]
  const float* cos;  // [P, r/2] or [P, H, r/2]
  const float* sin;
  const int32_t* position_index;  // [rope_tokens, num_positions], or null:
  GridTable grids;                // the rows of the tables follow from the grids of a layout
  int64_t rope_tokens;
  // Backward; pointers are null where a gradient is not wanted.
  bool wanted;
  Heads dy;
  void* dx;
  float* dweight_partial;  // [blocks, width of weight]
  float* dbias_partial;
  float* dweight;
  float* dbias;
};

// One pass. q and k have as many tokens, if they share an index or tables.
struct QkNormRope {
  QkSide side[2];  // q, k
  int64_t width;   // D
  // One stream (text, or video) of a joint sequence: token n of the pass is packed row index[n].
  const int64_t* index;  // null: packed row n
  bool gather;           // x is packed too; else x is the stream alone, token n is its row n
  bool rotate, same_tables;
  int64_t num_positions;
  int64_t axis_end[kMaxAxes];  // in pairs; the last is r/2
  int axes;
  bool per_head;
  int norm, pairing;
  float eps;
  int law;
  DType type;
  bool stream;  // outputs bypass the cache
};

inline int64_t packed_row(const QkNormRope& a, int64_t n) { return a.index ? a.index[n] : n; }
inline int64_t input_row(const QkNormRope& a, int64_t n) { return a.gather ? a.index[n] : n; }

}  // namespace sora

SORA_DECLARE_KERNEL_BF16(qk_norm_rope_fwd(const sora::QkNormRope&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(qk_norm_rope_bwd(const sora::QkNormRope&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(qk_norm_rope_bwd_finish(const sora::QkNormRope&, int64_t begin, int64_t end))
