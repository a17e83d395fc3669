// Scratch rows of one thread, and loops over rows.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "vec.h"

namespace sora::SORA_ISA {

struct true_type {
  static constexpr bool value = true;
};
struct false_type {
  static constexpr bool value = false;
};

// A few 64-byte aligned fp32 rows, padded to whole registers.
class Scratch {
 public:
  Scratch(int64_t width, int rows) : stride_((width + 15) / 16 * 16) {
    // + 64 bytes per row: rows a power of two apart would share cache sets
    memory_ = std::malloc((stride_ + 16) * rows * sizeof(float) + 64);
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* row() {
    float* result = next_;
    next_ += stride_ + 16;
    return result;
  }

 private:
  int64_t stride_;
  void* memory_;
  float* next_;
};

inline Vec first_lanes(Vec v, int64_t n) {  // zero outside the first n lanes
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_mov_ps((1u << n) - 1u, (__m512)v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = n; i < kLanes; ++i) lanes[i] = 0.0f;
  return load(lanes);
#endif
}

// Sum over a row of what term(offset, io) returns; four accumulators, fixed order.
template <class Term>
inline float sum_row(int64_t n, Term&& term) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t d = 0;
  for (; d + 4 * kLanes <= n; d += 4 * kLanes) {
    s0 = s0 + term(d, Full{});
    s1 = s1 + term(d + kLanes, Full{});
    s2 = s2 + term(d + 2 * kLanes, Full{});
    s3 = s3 + term(d + 3 * kLanes, Full{});
  }
  for (; d + kLanes <= n; d += kLanes) s0 = s0 + term(d, Full{});
  if (d < n) s1 = s1 + first_lanes(term(d, Tail{n - d}), n - d);
  return sum((s0 + s1) + (s2 + s3));
}

struct VecPair {
  Vec first, second;
};
struct Sums {
  float first, second;
};

// The same for two sums at once.
template <class Term>
inline Sums sum_row2(int64_t n, Term&& term) {
  Vec a0{}, a1{}, b0{}, b1{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= n; d += 2 * kLanes) {
    const VecPair u = term(d, Full{});
    const VecPair v = term(d + kLanes, Full{});
    a0 = a0 + u.first;
    b0 = b0 + u.second;
    a1 = a1 + v.first;
    b1 = b1 + v.second;
  }
  for (; d + kLanes <= n; d += kLanes) {
    const VecPair u = term(d, Full{});
    a0 = a0 + u.first;
    b0 = b0 + u.second;
  }
  if (d < n) {
    const VecPair u = term(d, Tail{n - d});
    a1 = a1 + first_lanes(u.first, n - d);
    b1 = b1 + first_lanes(u.second, n - d);
  }
  return {sum(a0 + a1), sum(b0 + b1)};
}

// out[d] = value(d, io) over a row, past the cache if asked and if the row is aligned for it.
template <class T, class Value>
inline void write_row(T* out, int64_t n, bool past_cache, Value&& value) {
  int64_t d = 0;
  if (past_cache && can_stream(out)) {
    for (; d + kLanes <= n; d += kLanes) stream(out + d, value(d, Full{}));
  } else {
    for (; d + kLanes <= n; d += kLanes) store(out + d, value(d, Full{}));
  }
  if (d < n) {
    const Tail io{n - d};
    io.put(out + d, value(d, io));
  }
}

}  // namespace sora::SORA_ISA
