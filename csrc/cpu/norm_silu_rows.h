// What the kernels of norm_silu share. Compiled once per instruction set.
#pragma once
#include "norm_silu.h"
#include "pair.h"
#include "sigmoid.h"

namespace sora::SORA_ISA {

struct Block {
  int64_t region, begin, end;  // positions
};
inline Block block_at(const NormSilu& a, int64_t unit) {
  const int64_t begin = unit % a.blocks * a.block;
  const int64_t end = begin + a.block;
  return {unit / a.blocks, begin, end < a.length ? end : a.length};
}
template <class T>
inline T* region_of(const NormSilu& a, const Regions& x, int64_t region) {
  return const_cast<T*>(static_cast<const T*>(x.data)) + region / a.frames * x.stride[0] +
         region % a.frames * x.stride[1];
}

template <bool kSilu>
inline Pair activate(Pair u) {
  if constexpr (kSilu) return silu(u);
  else return u;
}
template <bool kSilu>
inline Pair slope(Pair u, Pair dy) {
  if constexpr (kSilu) return dy * silu_slope(u);
  else return dy;
}

// Sums over the positions of a block, a row over channels in the order of pairs. Every few positions
// are summed by themselves: hundreds of additions in a row would cost digits.
struct BlockSum {
  float *total, *part;
  int64_t size;  // whole pairs
  BlockSum(Scratch& scratch, int64_t count)
      : total(scratch.row()), part(scratch.row()), size(whole_pairs(count)) {}
  void clear() {
    std::memset(total, 0, size * sizeof(float));
    std::memset(part, 0, size * sizeof(float));
  }
  void fold() {
    for (int64_t d = 0; d < size; d += kPair) {
      store_pair(total + d, load_pair(total + d) + load_pair(part + d));
      store_pair(part + d, Pair{});
    }
  }
};
constexpr int64_t kFold = 16;  // positions
constexpr int64_t kRows = 4;   // positions at once, channels last; divides kFold and a block

// Calls run(element type, with SiLU or not).
template <class Args, class Run>
inline void by_type(const Args& a, Run run) {
  auto typed = [&](auto type) { a.silu ? run(type, true_type{}) : run(type, false_type{}); };
  if (a.type == DType::bf16) typed(bf16{});
  else if (a.type == DType::f16) typed(f16{});
  else typed(float{});
  if (a.stream) stream_fence();
}

}  // namespace sora::SORA_ISA
