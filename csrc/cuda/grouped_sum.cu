// Stage two of the grouped reduction.
#include "grouped_sum.h"

namespace sora::cuda {
namespace {

constexpr int kColumns = 32;  // of one block of threads, neighbours in memory
constexpr int kLanes = 32;    // each adds every 32nd partial; their sums are added in order

__global__ void __launch_bounds__(kColumns* kLanes) finish_kernel(
    const __grid_constant__ FinishSums a) {
  __shared__ float lanes[kLanes][kColumns];
  const GroupedSum& g = a.sum[blockIdx.y];
  const int tiles = (a.width + kColumns - 1) / kColumns;
  const int64_t row = blockIdx.x / tiles;
  const int column = static_cast<int>(blockIdx.x % tiles) * kColumns + threadIdx.x;
  if (row >= g.num_rows) return;
  const int64_t first = row_begin(g.rows, row), end = row_begin(g.rows, row + 1);
  const int64_t last = end < a.tokens ? end : a.tokens;
  const int64_t size = a.block_tokens;
  const int64_t first_block = quotient(first, size);
  const int64_t last_block = last > first ? quotient(last - 1, size) : first_block;
  if (last > first && first_block == last_block) return;  // flushed whole
  float sum = 0.0f;
  if (last > first && column < a.width) {
    const float* heads = g.grad.partial + column;
    if (threadIdx.y == 0) sum = heads[(first_block * 2 + 1) * a.width];  // the tail
    const int64_t begin = first_block + (threadIdx.y == 0 ? kLanes : threadIdx.y);
#pragma unroll 8  // loads that do not wait for each other
    for (int64_t b = begin; b <= last_block; b += kLanes) sum += __ldg(heads + b * 2 * a.width);
  }
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.width) return;
  for (int i = 1; i < kLanes; ++i) sum += lanes[i][threadIdx.x];
  const float total[1] = {sum};
  store<1>(g.grad.result, g.grad.type, row * a.width + column, total);
}

}  // namespace

void finish_sums(const FinishSums& a, Stream stream) {
  int64_t rows = 0;
  for (int i = 0; i < a.count; ++i) rows = a.sum[i].num_rows > rows ? a.sum[i].num_rows : rows;
  const int64_t tiles = (a.width + kColumns - 1) / kColumns;
  launch(finish_kernel, dim3(blocks_of(rows * tiles, 1), a.count), dim3(kColumns, kLanes), 0,
         stream, a);
}

}  // namespace sora::cuda
