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
// Bytes of dynamic shared memory that need no permission, beside those of static variables.
constexpr int kFreeShared = 47 << 10;

#ifdef __CUDACC__
// Says which kernel failed and how it was launched. An error of an earlier kernel may show here first.
inline void check(cudaError_t error, const void* kernel, dim3 grid, dim3 block, int shared_bytes) {
  if (error == cudaSuccess) return;
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) != cudaSuccess || !name) name = "a kernel";
  cudaGetLastError();  // the next launch starts without it
  const auto shape = [](dim3 d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  throw std::runtime_error(std::string("sora_kernels: CUDA: ") + cudaGetErrorString(error) +
                           " at the launch of " + name + ", blocks " + shape(grid) + ", threads " +
                           shape(block) + ", shared bytes " + std::to_string(shared_bytes));
}
#endif

// An empty grid is a no-op. The kernel takes its arguments by value.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kFreeShared)
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  check(error, entry, grid, block, shared_bytes);
#else
  (void)stream;
  emulator::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
#endif
}

#ifdef __CUDACC__
// The dynamic shared memory of a block.
static __device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
using emulator::dynamic_shared;
#endif

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
