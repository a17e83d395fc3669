// How a pass of qk_norm_rope is laid over threads.
#include "qk_norm_rope_plan.h"

#include <algorithm>
#include <climits>
#include <stdexcept>

#include "qk_norm_rope.h"

namespace sora::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kUsualThreads = 128;
constexpr int kMostHeads = 6;       // of a group, one after the other
#ifdef SORA_EMULATED
constexpr int kMostBlocks = 3;      // so that tests see blocks that walk over several tiles
#else
constexpr int kMostBlocks = 1024;   // of one side of a backward: more only adds partial sums
#endif
constexpr int kShared = 48 << 10;   // bytes that need no permission

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool aligned(const Heads& x, int v) {
  return aligned(x.data) && x.batch_stride % v == 0 && x.token_stride % v == 0 &&
         x.head_stride % v == 0;
}

// Whether all accesses may have 16 bytes: v elements.
bool vectors_fit(const QkNormRope& a, int v) {
  if (a.width % v != 0) return false;
  if (a.pairing != kInterleaved) {  // runs lie within a half
    if (a.width / 2 % v != 0 || a.turned % v != 0) return false;
    for (int axis = 0; axis < a.axes && a.pairing == kHalfPerAxis; ++axis)
      if (a.axis_end[axis] % v != 0) return false;
  }
  return std::all_of(a.side, a.side + 2, [&](const QkSide& s) {
    return aligned(s.x, v) && aligned(s.dy, v) && aligned(s.y) && aligned(s.dx) &&
           aligned(s.weight.data) && aligned(s.bias.data);
  });
}

// Groups that share the heads of a token: as few as leave none idle, so that each gets several heads
// for its cos and sin.
int slots_for(int heads, int groups) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int slots = 1; slots <= groups; slots *= 2) {
    const int64_t rounds = ceil_div(heads, slots);
    if (rounds > kMostHeads && slots * 2 <= groups) continue;
    if (rounds * slots < least) best = slots, least = rounds * slots;
  }
  return best;
}

// Bytes for the gradients of weights of `copies` rows.
int64_t gradient_bytes(const QkNormRope& a, const QkSide& s, int64_t copies) {
  return copies * qk_parameters(a, s) * 4 * ((s.dweight || s.dbias) + (s.dbias ? 1 : 0));
}

}  // namespace

void qk_plan(QkNormRope& a, bool backward) {
  a.turned = a.rotate ? a.axis_end[a.axes - 1] : 0;
  if (!a.rotate) a.pairing = kInterleaved;
  const int v = a.type == DType::f32 ? 4 : 8;
  a.vectors = vectors_fit(a, v);
  const int64_t needed = ceil_div(a.width / 2, a.vectors ? v : 1);
  for (a.lanes = 1; a.lanes < needed && a.lanes < kWarp;) a.lanes *= 2;
  a.steps = static_cast<int>(ceil_div(needed, a.lanes));

  const bool full = a.norm == kRmsFull;
  const int most_heads = std::max({a.side[0].heads, a.side[1].heads, 1});
  a.threads = kUsualThreads;
  if (full) {  // a token in one block, every head in a group of its own if they fit
    const int64_t rounds = ceil_div(int64_t{most_heads} * a.lanes, kMostThreads);
    const int64_t threads = ceil_div(most_heads, rounds) * a.lanes;
    a.threads = static_cast<int>(std::max<int64_t>(ceil_div(threads, kWarp) * kWarp, kUsualThreads));
  } else if (backward) {  // a group sums the gradients of a long head on its own
    while (a.threads > kWarp && std::any_of(a.side, a.side + 2, [&](const QkSide& s) {
             return gradient_bytes(a, s, a.threads / a.lanes) > kShared / 2;
           }))
      a.threads /= 2;
  }

  const int groups = a.threads / a.lanes;
  a.shared_bytes = 0;
  for (QkSide& s : a.side) {
    if (!backward) s.wanted = s.tokens > 0;
    if (s.tokens > INT_MAX || s.x.per_batch > INT_MAX || s.dy.per_batch > INT_MAX ||
        s.rope_tokens > INT_MAX || qk_parameters(a, s) > INT_MAX / kMostThreads)
      throw std::runtime_error("sora_kernels: qk_norm_rope: expected fewer than 2^31 tokens and "
                               "2^22 components of a token");
    const int heads = std::max(s.heads, 1);
    s.slots = full ? static_cast<int>(ceil_div(heads, ceil_div(heads, groups)))
                   : slots_for(heads, groups);
    s.tile = groups / s.slots;
    int64_t bytes = gradient_bytes(a, s, full ? s.tile : groups);
    s.direct = 4 * shared_words(s.tile, groups) + bytes > kShared;
    if (s.direct) s.tile = 1, bytes = 0;
    s.tiles = s.wanted ? ceil_div(s.tokens, s.tile) : 0;
    s.blocks = static_cast<int>(backward ? std::min<int64_t>(s.tiles, kMostBlocks) : s.tiles);
    a.shared_bytes =
        std::max(a.shared_bytes, 4 * shared_words(s.tile, groups) + static_cast<int>(bytes));
  }
}

int64_t qk_partials(const QkNormRope& a, const QkSide& s) {
  return gradient_bytes(a, s, s.blocks) / 4;
}

}  // namespace sora::cuda
