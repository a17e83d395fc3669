// What the plan of qk_norm_rope (qk_norm_rope_plan.cpp) and its kernels agree on.
#pragma once
#include "host_device.h"

namespace sora::cuda {

constexpr int kMostThreads = 384;  // of a block, 168 registers each: a norm across heads takes many

// Shared memory in words of 4 bytes, before the gradients of weights: [tile, 4] rows of the tables and
// [2, groups] sums, in whole 16 bytes.
SORA_HD int shared_words(int tile, int groups) { return 4 * tile + (2 * groups + 3) / 4 * 4; }

}  // namespace sora::cuda
