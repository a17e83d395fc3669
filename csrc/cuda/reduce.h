// Sums over the threads that share a row: blockDim.x of them, a whole number of warps. Rows of one
// warp may share a block (blockDim.y); they never wait for each other, so each may leave when done.
#pragma once
#include "launch.h"
#include "vectors.h"

namespace sora::cuda {

constexpr int kMaxWarps = 32;
constexpr int kSlots = 2;

// One per block: `__shared__ TeamScratch<2> scratch;` for up to two sums at a time.
template <int N>
struct alignas(N * sizeof(float)) TeamScratch {
  float cell[kSlots][kMaxWarps][N];
};

// Replaces each of N numbers by its sum over the row's threads, all of which get the same bits. Two
// calls after another need different slots: the barrier of the second tells that the first was read.
template <int N>
SORA_D void team_sum(float (&v)[N], TeamScratch<N>& scratch, int slot) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += __shfl_xor_sync(kFullMask, v[j], lane);
  }
  if (blockDim.x == kWarp) return;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) scratch.cell[slot][warp][j] = v[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = scratch.cell[slot][0][j];
#pragma unroll 4
  for (int i = 1; i < warps; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += scratch.cell[slot][i][j];
  }
}

SORA_D float team_sum(float v, TeamScratch<1>& scratch, int slot) {
  float one[1] = {v};
  team_sum<1>(one, scratch, slot);
  return one[0];
}

// --- how many threads take a row ----------------------------------------------------------------------

// With `elements` numbers of the row per thread; narrow rows, one warp each, share a block.
inline dim3 row_threads(int width, int elements, int most) {
  const int threads = round_up((width + elements - 1) / elements, kWarp);
  if (threads <= kWarp) return dim3(kWarp, 4);
  return dim3(threads < most ? threads : most, 1);
}

}  // namespace sora::cuda
