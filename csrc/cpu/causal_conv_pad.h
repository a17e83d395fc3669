// The input of a causal 3-D convolution in one copy, and its gradient: what the binding
// (causal_conv_pad.cpp) and the kernels (causal_conv_pad_kernels.cpp) say to each other.
//
// Tensors are [B, A, T, H, W, I]: A = channels, I = 1 where channels come first, A = 1,
// I = channels where they come last.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace sora {

struct Frames {
  const char* data = nullptr;
  int64_t stride[6] = {};  // bytes
  bool dense_row = false;    // W and I are one contiguous stretch
  bool dense_frame = false;  // H, W and I are
};

struct CausalConvPad {
  int64_t planes, outer;          // B * A, A
  int64_t frames, height, width;  // of x
  int64_t inner, element;         // I, bytes of an element
  int64_t cache_frames, fill;     // fill + cache_frames = pad_t
  int64_t top, bottom, left, right;
  int64_t keep;
  bool replicate, stream;

  int64_t padded_frames() const { return fill + cache_frames + frames; }
  int64_t padded_height() const { return top + height + bottom; }
  int64_t row_bytes() const { return width * inner * element; }
};

struct CausalConvPadFwd : CausalConvPad {
  Frames x, cache;
  char* padded;
  char* kept;
};

struct CausalConvPadBwd : CausalConvPad {
  Frames dpadded, dkept;
  DType type;
  char* grad;           // of `count` source frames (cache frames, then x) from `first` on
  int64_t first, count;
};

}  // namespace sora

// Rows [begin, end) of padded: (plane, frame, h).
SORA_DECLARE_KERNEL(causal_conv_pad_fwd(const sora::CausalConvPadFwd&, int64_t begin, int64_t end))
// Rows [begin, end) of grad: (plane, frame, h).
SORA_DECLARE_KERNEL(causal_conv_pad_bwd(const sora::CausalConvPadBwd&, int64_t begin, int64_t end))
