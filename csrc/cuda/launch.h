// The one way to launch a kernel. Compiled by nvcc it runs on the GPU; compiled by a C++ compiler
// with tests/cuda_emulator on its path, the same source runs on the CPU, one fiber per CUDA thread.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "sums.h"

namespace sora::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kStaticShared = 48 << 10;  // bytes of shared memory that need no permission

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sora_kernels: CUDA: ") + cudaGetErrorString(error));
}

// An empty grid is a no-op. The kernel takes its arguments by value.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  if (shared_bytes > kStaticShared)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
#else
  (void)stream;
  emulator::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
#endif
}

// Blocks of a grid in x; the largest grid is 2^31 - 1.
inline unsigned blocks_of(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > INT32_MAX)
    throw std::runtime_error("sora_kernels: CUDA: expected fewer than 2^31 blocks of tokens");
  return static_cast<unsigned>(blocks);
}

inline int round_up(int64_t n, int64_t unit) {
  return static_cast<int>((n + unit - 1) / unit * unit);
}

}  // namespace sora::cuda
