// Kernels that show what the emulator finds; compiled for tests/cuda/test_emulator.py alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ahead.h"

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

// One number a thread through shared memory by cp.async, waited for or not.
template <bool Waits>
SORA_D void copy(const float* in, float* out) {
  __shared__ float cells[64];
  copy_later<4>(cells + threadIdx.x, in + threadIdx.x);
  end_group();
  if (Waits) wait_for_copies<0>();
  else wait_for_copies<1>();
  out[threadIdx.x] = cells[threadIdx.x];
}
__global__ void waited_kernel(const float* in, float* out) { copy<true>(in, out); }
__global__ void too_early_kernel(const float* in, float* out) { copy<false>(in, out); }

// Thread 0 alone: a ring of three places brings pieces 1, 2, ... 16 in order, the last asked for early.
__global__ void ring_kernel(const float* in, float* out) {
  if (threadIdx.x != 0) return;
  const AheadPlan plan{3, 64 * kThreadBytes<1>, 3 * 64 * kThreadBytes<1>};
  Ahead<1> ahead(plan);
  auto ask = [&](int token) {
    if (token < 16) ahead.ask<float, 4>(0, in + 4 * token);
    ahead.end();
  };
  for (int token = 0; token < plan.tokens; ++token) ask(token);
  for (int token = 0; token < 16; ++token) {
    ahead.wait();
    const auto words = ahead.take<float, 4>(0);
    ask(token + plan.tokens);
    float v[4];
    widen<float, 4>(words, v);
    store<float, 4>(out + 4 * token, v);
  }
}

}  // namespace
}  // namespace sora::cuda

#define SORA_TOY_SHARED 12288
#define SORA_TOY(name)                                                                    \
  extern "C" __attribute__((visibility("default"))) int name(const float* in, float* out) { \
    try {                                                                                 \
      sora::cuda::launch(sora::cuda::name##_kernel, dim3(1), dim3(64), SORA_TOY_SHARED, nullptr, in, \
                         out);                                                            \
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
SORA_TOY(waited)
SORA_TOY(too_early)
SORA_TOY(ring)

// Rounds n numbers to bf16 or fp16 and back.
extern "C" __attribute__((visibility("default"))) void round_trip(const float* in, float* out, int n,
                                                                  int to_half) {
  for (int i = 0; i < n; ++i)
    out[i] = to_half ? __half2float(__float2half_rn(in[i]))
                     : __bfloat162float(__float2bfloat16_rn(in[i]));
}
