// Two registers of floats, loaded from and stored to 2 * kLanes neighbours of any type. Half
// precision numbers cost less in pairs: of one register of bf16 a shift gives the even elements and a
// mask the odd ones, so that is their order within a pair. A row of fp32 numbers that belongs to the
// elements (a weight, a sum) is brought into this order once, by `arrange`.
#pragma once
#include "scratch.h"

namespace sora::SORA_ISA {

constexpr int kPair = 2 * kLanes;

struct Pair {
  Vec a, b;
};
inline Pair both(Vec v) { return {v, v}; }
inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair mul_add(Pair x, Pair y, Pair z) {
  return {mul_add(x.a, y.a, z.a), mul_add(x.b, y.b, z.b)};
}
inline Pair sub_mul(Pair z, Pair x, Pair y) {
  return {sub_mul(z.a, x.a, y.a), sub_mul(z.b, x.b, y.b)};
}

// --- bf16: even elements, odd elements -------------------------------------------------------------

typedef uint16_t HPair __attribute__((vector_size(kPair * 2)));  // one register

inline Pair widen(HPair h, const bf16*) {
  const UVec u = (UVec)h;
  return {(Vec)(u << 16), (Vec)(u & 0xffff0000u)};
}
#if !defined(__AVX512BF16__)
inline UVec rounded_bits(Vec v) {  // the upper half holds the result, see narrow() in vec.h
  const UVec u = (UVec)v;
  const UVec rounded = u + 0x7fffu + ((u >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (UVec)_mm512_mask_mov_epi32((__m512i)rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
#else
  const IVec is_nan = v != v;
  return ((UVec)is_nan & 0x7fc00000u) | (~(UVec)is_nan & rounded);
#endif
}
#endif
inline HPair narrow(Pair v, const bf16*) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
  return (HPair)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
#else
  return (HPair)((rounded_bits(v.a) >> 16) | (rounded_bits(v.b) & 0xffff0000u));
#endif
}

// --- loads and stores of a pair, or of its first n < kPair elements (the others are zero) -----------

template <class T>
constexpr bool kByParity = sizeof(T) == 2;
template <>
inline constexpr bool kByParity<f16> = false;

inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
inline Pair load_pair(const f16* p) { return {load(p), load(p + kLanes)}; }
inline Pair load_pair(const bf16* p) {
  HPair h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, p);
}
template <class T>
inline void store_pair(T* p, Pair v) {
  if constexpr (kByParity<T>) {
    const HPair h = narrow(v, p);
    std::memcpy(p, &h, sizeof h);
  } else {
    store(p, v.a);
    store(p + kLanes, v.b);
  }
}

struct FullPair {
  template <class T>
  Pair get(const T* p) const { return load_pair(p); }
  template <class T>
  void put(T* p, Pair v) const { store_pair(p, v); }
  template <class T>
  Pair only(Pair v) const { return v; }
};
struct TailPair {
  int64_t n;
  template <class T>
  Pair get(const T* p) const {
#if defined(__AVX512F__)
    const __mmask32 mask = (uint32_t{1} << n) - 1u;
    if constexpr (sizeof(T) == 2) {
      const __m512i bits = _mm512_maskz_loadu_epi16(mask, p);
      if constexpr (kByParity<T>) return widen((HPair)bits, p);
      else return {widen((HVec)_mm512_castsi512_si256(bits), p),
                   widen((HVec)_mm512_extracti64x4_epi64(bits, 1), p)};
    } else {
      return {(Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p),
              (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + kLanes)};
    }
#else
    T buffer[kPair] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load_pair(buffer);
#endif
  }
  template <class T>
  void put(T* p, Pair v) const {
#if defined(__AVX512F__)
    const __mmask32 mask = (uint32_t{1} << n) - 1u;
    if constexpr (kByParity<T>) {
      _mm512_mask_storeu_epi16(p, mask, (__m512i)narrow(v, p));
    } else if constexpr (sizeof(T) == 2) {
      _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)narrow(v.a, p));
      _mm256_mask_storeu_epi16(p + kLanes, static_cast<__mmask16>(mask >> 16),
                               (__m256i)narrow(v.b, p));
    } else {
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v.a);
      _mm512_mask_storeu_ps(p + kLanes, static_cast<__mmask16>(mask >> 16), (__m512)v.b);
    }
#else
    T buffer[kPair];
    store_pair(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
#endif
  }
  // A pair of T with zero in place of what lies past the end.
  template <class T>
  Pair only(Pair v) const {
    const int64_t a = kByParity<T> ? (n + 1) / 2 : n < kLanes ? n : kLanes;
    return {a < kLanes ? first_lanes(v.a, a) : v.a, first_lanes(v.b, n - a)};
  }
};
// Calls body(offset, io) over n elements, io a FullPair or, at the end, a TailPair.
template <class Body>
inline void for_pairs(int64_t n, Body&& body) {
  int64_t d = 0;
  for (; d + kPair <= n; d += kPair) body(d, FullPair{});
  if (d < n) body(d, TailPair{n - d});
}

// --- past the cache ---------------------------------------------------------------------------------

inline void stream_pair(float* p, Pair v) {
  stream(p, v.a);
  stream(p + kLanes, v.b);
}
inline void stream_pair(f16* p, Pair v) {
  stream(p, v.a);
  stream(p + kLanes, v.b);
}
inline void stream_pair(bf16* p, Pair v) {
  const HPair h = narrow(v, p);
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)h);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)h);
#else
  std::memcpy(p, &h, sizeof h);
#endif
}
template <class T>
inline bool can_stream_pair(const T* p) {
  constexpr uintptr_t align = kByParity<T> ? kPair * sizeof(T) : kLanes * sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % align == 0;
}

// out[d] = value(d, io) over a row, past the cache if asked and if the row is aligned for it.
template <class T, class Value>
inline void write_pairs(T* out, int64_t n, bool past_cache, Value&& value) {
  int64_t d = 0;
  if (past_cache && can_stream_pair(out)) {
    for (; d + kPair <= n; d += kPair) stream_pair(out + d, value(d, FullPair{}));
  } else {
    for (; d + kPair <= n; d += kPair) store_pair(out + d, value(d, FullPair{}));
  }
  if (d < n) {
    const TailPair io{n - d};
    io.put(out + d, value(d, io));
  }
}

// --- rows of fp32 numbers in the order of pairs of T ---------------------------------------------------

// to[] needs whole pairs of memory; past n it is zero.
template <class T>
inline void arrange(float* to, const float* from, int64_t n) {
  for_pairs(n, [&](int64_t d, auto io) {
    float given[kPair], ordered[kPair];
    store_pair(given, io.get(from + d));
    for (int i = 0; i < kLanes; ++i) {
      ordered[i] = given[kByParity<T> ? 2 * i : i];
      ordered[kLanes + i] = given[kByParity<T> ? 2 * i + 1 : kLanes + i];
    }
    store_pair(to + d, load_pair(ordered));
  });
}
// The way back; from[] has whole pairs.
template <class T>
inline void disarrange(float* to, const float* from, int64_t n) {
  for_pairs(n, [&](int64_t d, auto io) {
    float given[kPair], ordered[kPair];
    store_pair(given, load_pair(from + d));
    for (int i = 0; i < kLanes; ++i) {
      ordered[kByParity<T> ? 2 * i : i] = given[i];
      ordered[kByParity<T> ? 2 * i + 1 : kLanes + i] = given[kLanes + i];
    }
    io.put(to + d, load_pair(ordered));
  });
}
inline int64_t whole_pairs(int64_t n) { return (n + kPair - 1) / kPair * kPair; }

}  // namespace sora::SORA_ISA
