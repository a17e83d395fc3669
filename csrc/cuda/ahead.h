// The rows of tokens to come, on their way from memory to shared memory (cp.async) while the token at
// hand is worked on. A GPU reaches its bandwidth only with tens of KB under way to every
// multiprocessor; a loop that loads a token, waits for its sums and stores it has none most of the time.
//
// Every thread asks for the very bytes that it will read itself, so nobody waits for anybody else, and
// what is under way takes no registers.
#pragma once
#include "launch.h"
#include "norm.h"
#include "vectors.h"

namespace sora::cuda {

// 16 or 4 bytes, there at the latest when wait_for_copies says so.
template <int Bytes>
SORA_D void copy_later(void* shared, const void* global) {
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
#else
  emulator::copy_later(shared, global, Bytes);
#endif
}

// What was asked for since the last call is one group.
SORA_D void end_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::end_group();
#endif
}

// Until all groups but the last `Left` are there.
template <int Left>
SORA_D void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#else
  emulator::wait_for_copies(Left);
#endif
}

constexpr int kMostAhead = 4;  // tokens
// Blocks of more threads than these have a multiprocessor to themselves, by their registers, and all of
// its shared memory that every chip from 8.0 on has.
constexpr int kFriendlyThreads = 320, kAllShared = 96 << 10;

// V numbers in pieces of 16 bytes.
template <class T, int V>
constexpr int kPieces = V * static_cast<int>(sizeof(T)) / 16;

// The shared memory of a block: a ring of places for one token each. In a place the pieces of a thread
// lie side by side, its two statistics after them; an odd number of 16 bytes keeps neighbouring threads
// in different banks.
struct AheadPlan {
  int tokens, place_bytes, bytes;
};
template <int Pieces>
constexpr int kThreadBytes = 16 * ((Pieces + 1) | 1);

template <int Pieces>
AheadPlan plan_ahead(dim3 block) {
  const int threads = static_cast<int>(block.x * block.y), place = threads * kThreadBytes<Pieces>;
  const int fit = (threads > kFriendlyThreads ? kAllShared : kFreeShared) / place;
  const int tokens = fit < 1 ? 1 : fit < kMostAhead ? fit : kMostAhead;
  return {tokens, place, tokens * place};
}

// What one thread asks for and takes. The place that was read is the next to be filled.
template <int Pieces>
class Ahead {
 public:
  __device__ __forceinline__ explicit Ahead(const AheadPlan& plan)
      : plan_(plan),
        memory_(static_cast<char*>(dynamic_shared()) +
                static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) * kThreadBytes<Pieces>) {}

  // The next token to be asked for: its numbers, its statistics, and then `end`, for no token as well.
  template <class T, int V>
  __device__ __forceinline__ void ask(int piece, const T* from) {
#pragma unroll
    for (int i = 0; i < kPieces<T, V>; ++i)
      copy_later<16>(place() + piece + i, reinterpret_cast<const char*>(from) + 16 * i);
  }
  __device__ __forceinline__ void ask_statistics(const Normed& a, int64_t n) {
    if (a.mean) copy_later<4>(statistics(), a.mean + n);
    copy_later<4>(statistics() + 1, a.rstd + n);
  }
  __device__ __forceinline__ void end() {
    end_group();
    now_ += plan_.place_bytes;
    if (now_ == plan_.bytes) now_ = 0;
  }

  // The oldest token that was asked for: `wait`, then its numbers and its mean and rstd.
  __device__ __forceinline__ void wait() const {
    static_assert(kMostAhead == 4);
    if (plan_.tokens == 1) wait_for_copies<0>();
    else if (plan_.tokens == 2) wait_for_copies<1>();
    else if (plan_.tokens == 3) wait_for_copies<2>();
    else wait_for_copies<3>();
  }
  template <class T, int V>
  __device__ __forceinline__ Words<T, V> take(int piece) const {
    Words<T, V> r;
#pragma unroll
    for (int i = 0; i < kPieces<T, V>; ++i) {
      const uint4 u = place()[piece + i];
      r.word[4 * i] = u.x, r.word[4 * i + 1] = u.y, r.word[4 * i + 2] = u.z, r.word[4 * i + 3] = u.w;
    }
    return r;
  }
  __device__ __forceinline__ float mean(const Normed& a) const {
    return a.mean ? statistics()[0] : 0.0f;
  }
  __device__ __forceinline__ float rstd() const { return statistics()[1]; }

 private:
  __device__ __forceinline__ float* statistics() const {
    return reinterpret_cast<float*>(place() + Pieces);
  }
  __device__ __forceinline__ uint4* place() const { return reinterpret_cast<uint4*>(memory_ + now_); }

  const AheadPlan& plan_;
  char* memory_;  // of the thread, in the first place
  int now_ = 0;
};

}  // namespace sora::cuda
