// silu(norm(x) * weight + bias), forward and backward: what the binding (norm_silu.cpp) and the
// kernels (norm_silu_rms_kernels.cpp, norm_silu_group_kernels.cpp) say to each other.
//
// Tensors are [B, F, L, C] with unit stride along C (channels last) or L (channels first). A region
// is one (b, f); positions of a region are cut into blocks, the unit of work and of partial sums.
// Statistics are per position (RMS over C) or per region and group of channels (GroupNorm).
#pragma once
#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace sora {

constexpr int64_t kNormSiluBlock = 128;        // positions
constexpr int64_t kNormSiluLongBlock = 2048;   // GroupNorm, channels first: long stretches of memory
constexpr int64_t kNormSiluCached = 32 * 1024;  // elements of a block of RMS, channels first

struct Regions {
  const void* data = nullptr;
  int64_t stride[4] = {};  // B, F, L, C; elements
};

struct NormSilu {
  int64_t regions, frames, length, width, blocks;  // B * F, F, L, C, blocks per region
  int64_t block;                                   // positions of a block
  int64_t groups;                                  // 0: RMS
  DType type;
  bool last, silu, stream;  // channels last; with SiLU; the output bypasses the cache
  float eps, floor;         // RMS: rstd = 1 / max(sqrt(mean square + eps), floor)
  const float* weight;      // [C], never null
  const float* bias;
  Regions x, out;           // out: y or dx
  float* mean;              // [R, G]; null for RMS
  float* rstd;              // [R, L] for RMS, else [R, G]
};

struct NormSiluFwd : NormSilu {
  float* block_mean;  // [R, blocks, C]: mean of a channel over a block,
  float* block_m2;    // and the sum of squared differences from it; null for RMS
};

struct NormSiluBwd : NormSilu {
  Regions dy;
  float* sum_du;      // [R, blocks, C]: sum of du over a block, u what SiLU is applied to; may be null
  float* sum_duxhat;  // the same of du * xhat
  float* c1;          // [R, G]: means of du * weight and of du * weight * xhat; null for RMS
  float* c2;
};

// Some blocks of some channels of a region.
struct NormSiluPart {
  int64_t region, block, block_end;
  int64_t channel, channel_end;  // whole groups; all channels where they come last
};

}  // namespace sora

// RMS: blocks [begin, end) of all regions.
SORA_DECLARE_KERNEL_BF16(norm_silu_rms_fwd(const sora::NormSiluFwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(norm_silu_rms_bwd(const sora::NormSiluBwd&, int64_t begin, int64_t end))
SORA_DECLARE_KERNEL_BF16(norm_silu_group_stats(const sora::NormSiluFwd&, const sora::NormSiluPart&))
SORA_DECLARE_KERNEL_BF16(norm_silu_group_fwd(const sora::NormSiluFwd&, const sora::NormSiluPart&))
SORA_DECLARE_KERNEL_BF16(norm_silu_group_sums(const sora::NormSiluBwd&, const sora::NormSiluPart&))
SORA_DECLARE_KERNEL_BF16(norm_silu_group_bwd(const sora::NormSiluBwd&, const sora::NormSiluPart&))
