// Kernels that show what the emulator finds; compiled for tests/cuda/test_emulator.py alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace sora::cuda {
namespace {

__global__ void reverse_kernel(const float* in, float* out) {  // correct: a barrier between
  __shared__ float cells[64];
  cells[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = cells[blockDim.x - 1 - threadIdx.x];
}
__global__ void race_kernel(const float* in, float* out) {  // the same without it
  __shared__ float cells[64];
  cells[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = cells[blockDim.x - 1 - threadIdx.x];
}
__global__ void divergent_kernel(const float*, float*) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void divergent_shuffle_kernel(const float* in, float* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 2);
}
__global__ void shuffles_kernel(const float* in, float* out) {
  const float v = in[threadIdx.x];
  const float xored = __shfl_xor_sync(0xffffffffu, v, 1), first = __shfl_sync(0xffffffffu, v, 0);
  const float down = __shfl_down_sync(0xffffffffu, v, 3), up = __shfl_up_sync(0xffffffffu, v, 5, 16);
  out[threadIdx.x] = xored + 100 * first + 1e4f * down + 1e6f * up;
}

}  // namespace
}  // namespace sora::cuda

#define SORA_TOY(name)                                                                    \
  extern "C" __attribute__((visibility("default"))) int name(const float* in, float* out) { \
    try {                                                                                 \
      sora::cuda::launch(sora::cuda::name##_kernel, dim3(1), dim3(64), 0, nullptr, in, out); \
      return 0;                                                                           \
    } catch (const std::runtime_error&) {                                                 \
      return 1;                                                                           \
    }                                                                                     \
  }
SORA_TOY(reverse)
SORA_TOY(race)
SORA_TOY(divergent)
SORA_TOY(divergent_shuffle)
SORA_TOY(shuffles)

// Rounds n numbers to bf16 or fp16 and back.
extern "C" __attribute__((visibility("default"))) void round_trip(const float* in, float* out, int n,
                                                                  int to_half) {
  for (int i = 0; i < n; ++i)
    out[i] = to_half ? __half2float(__float2half_rn(in[i]))
                     : __bfloat162float(__float2bfloat16_rn(in[i]));
}
