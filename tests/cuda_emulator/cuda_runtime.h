// Enough of CUDA to run the kernels of csrc/cuda on the CPU, compiled by a C++ compiler from the very
// same source. Every CUDA thread of a block is a fiber; fibers are switched where threads wait for
// each other: __syncthreads, __syncwarp and shuffles. Blocks run one after another, on one core.
//
// What it finds beyond wrong results: barriers and shuffles that not all threads reach (an error, not
// a hang), results that depend on the order of threads (run with both orders, see sora_emulator_order),
// shared memory that is read before it was written (it is poisoned before every block) and what was
// asked for by cp.async and not waited for (the copy is made by the wait, as late as can be).
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulator_shared")))

namespace emulator {

extern dim3 grid_dim, block_dim, block_index, thread_index;

// Runs body() once per thread of a grid; throws std::runtime_error if threads wait for ever.
void run(dim3 grid, dim3 block, int shared_bytes, const std::function<void()>& body);

void* dynamic_shared();
void block_barrier();
void warp_barrier(unsigned mask);
// cp.async of the calling thread. What was asked for is poison until it was waited for.
void copy_later(void* shared, const void* global, int bytes);
void end_group();
void wait_for_copies(int groups_left);
// The 8 bytes that lane `source` brings to this shuffle.
uint64_t exchange(unsigned mask, uint64_t bits, int source);
int lane();

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

#define gridDim emulator::grid_dim
#define blockDim emulator::block_dim
#define blockIdx emulator::block_index
#define threadIdx emulator::thread_index

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const int lane = emulator::lane(), source = lane ^ other;
  return emulator::shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle(mask, value, emulator::lane() / width * width + source % width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = emulator::lane(), source = lane + delta;
  return emulator::shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = emulator::lane(), source = lane - delta;
  return emulator::shuffle(mask, value, source >= lane / width * width ? source : lane);
}

// A vector access to an address that is not a multiple of its size is a fault on a GPU.
template <class T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) __builtin_trap();
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
