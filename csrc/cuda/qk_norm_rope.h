// Norm and rotation of q and k on CUDA: what the binding (qk_norm_rope.cpp) and the kernels
// (qk_norm_rope_kernels.cu) say to each other. The formula is in ops/qk_norm_rope/reference.py.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "grid.h"
#include "qk.h"
#include "sums.h"

namespace sora::cuda {

struct QkSide {
  int64_t tokens = 0;
  int heads = 0;
  Heads x;
  Matrix weight, bias;         // row h serves head h: stride D for a norm across heads, else 0
  void* y = nullptr;           // forward: [packed tokens, H, D]
  const float* cos = nullptr;  // [P, r/2] or [P, H, r/2]
  const float* sin = nullptr;
  const int32_t* position_index = nullptr;  // [rope_tokens, num_positions], or null:
  GridTable grids;                          // the rows follow from the grids of a layout
  int64_t rope_tokens = 1;
  // Backward; pointers are null where a gradient is not wanted.
  bool wanted = true;
  Heads dy;
  void* dx = nullptr;
  float* dweight = nullptr;  // [D] or [H * D]
  float* dbias = nullptr;    // [D]
  // How the pass is laid over threads: filled by qk_plan.
  int slots = 1;      // groups of lanes that share the heads of a token
  int tile = 1;       // tokens of a block at a time
  int64_t tiles = 0;  // of the pass
  int blocks = 0;     // that walk over them
  bool direct = false;       // a block sums gradients of weights where its partial sums lie
  float* partial = nullptr;  // [dweight, dbias][blocks, size of weight]
};

// One pass, given to the kernels by value. q and k have as many tokens, if they share an index.
struct QkNormRope {
  QkSide side[2];  // q, k
  int width = 0;   // D
  // One stream (text, or video) of a joint sequence: token n of the pass is packed row index[n].
  const int64_t* index = nullptr;  // null: packed row n
  bool gather = false;  // x is packed too; else x is the stream alone, token n is its row n
  bool rotate = false, per_head = false;
  int num_positions = 0;        // columns of the position index: 1, or one for each axis
  int axis_end[kMaxAxes] = {};  // in pairs; the last is r/2
  int axes = 0;
  int norm = 0, pairing = 0;
  float eps = 0.0f;
  int law = 0;
  DType type = DType::f32;
  // Filled by qk_plan.
  bool vectors = false;  // 16 bytes at a time
  int turned = 0;        // pairs that are rotated, r/2
  int lanes = 1;         // of a group, which works on one head: a power of two up to a warp
  int steps = 1;         // pieces of a head, one after the other
  int threads = 0, shared_bytes = 0;
};

// Size of a weight.
SORA_HD int64_t qk_parameters(const QkNormRope& a, const QkSide& s) {
  return int64_t{a.width} * (a.norm == kRmsFull ? s.heads : 1);
}

// Lays a pass over threads: a function of shapes, strides and alignments alone.
void qk_plan(QkNormRope& a, bool backward);
// Floats that a backward then needs at `partial` of a side.
int64_t qk_partials(const QkNormRope& a, const QkSide& side);

// Both take a plan.
void qk_norm_rope_fwd(const QkNormRope& a, Stream stream);
void qk_norm_rope_bwd(const QkNormRope& a, Stream stream);

}  // namespace sora::cuda
