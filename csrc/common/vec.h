// One SIMD register of floats. Its width follows the instruction set of the translation unit:
// every kernel file is compiled once per instruction set, in a namespace named after it (SORA_ISA),
// and csrc/cpu/isa.h picks one at run time. Everything here lives in that namespace, because a
// shared inline function would be merged by the linker into one (possibly illegal) version.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef SORA_ISA
#error "compile kernel files with -DSORA_ISA=<namespace>; see setup.py"
#endif

namespace sora::SORA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));

inline Vec splat(float v) { return Vec{} + v; }

// --- fp32 <-> storage, one register ---------------------------------------------------------

// The conversions are spelt out because GCC 12 splits __builtin_convertvector into halves.
inline UVec zero_extend(HVec h) {
#if defined(__AVX512F__)
  return (UVec)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (UVec)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, UVec);
#endif
}
inline HVec low_halves(UVec u) {
#if defined(__AVX512F__)
  return (HVec)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, HVec);
#endif
}

inline Vec widen(HVec h, const bf16*) { return (Vec)(zero_extend(h) << 16); }

inline HVec narrow(Vec v, const bf16*) {  // round to nearest even, NaN stays NaN
#if defined(__AVX512BF16__)
  // The same bits, except that numbers below 2^-126 (subnormal in both formats) become 0.
  return (HVec)_mm512_cvtneps_pbh((__m512)v);
#else
  UVec u = (UVec)v;
  UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = (UVec)_mm512_mask_mov_epi32((__m512i)rounded, is_nan, _mm512_set1_epi32(0x7fc0));
#else
  IVec is_nan = v != v;
  rounded = ((UVec)is_nan & 0x7fc0u) | (~(UVec)is_nan & rounded);
#endif
  return low_halves(rounded);
#endif
}

inline Vec widen(HVec h, const f16*) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
  // Move exponent and mantissa into place and rescale: exact for normal and subnormal numbers.
  UVec u = __builtin_convertvector(h, UVec);
  UVec sign = (u & 0x8000u) << 16;
  UVec magnitude = (u & 0x7fffu) << 13;
  Vec value = (Vec)magnitude * splat(0x1p112f);
  UVec special = (UVec)((u & 0x7c00u) == 0x7c00u);  // infinity and NaN keep all exponent bits
  UVec bits = (special & (magnitude | 0x7f800000u)) | (~special & (UVec)value);
  return (Vec)(bits | sign);
#endif
}

inline HVec narrow(Vec v, const f16*) {
#if defined(__AVX512F__)
  return (HVec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  UVec u = (UVec)v;
  UVec sign = (u >> 16) & 0x8000u;
  UVec magnitude = u & 0x7fffffffu;
  // Subnormal halves: adding 0.5 aligns the mantissa so that the FPU itself rounds to even.
  Vec shifted = (Vec)magnitude + splat(0.5f);
  UVec small = (UVec)shifted - 0x3f000000u;
  UVec normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  UVec is_small = (UVec)(magnitude < 0x38800000u);
  UVec is_big = (UVec)(magnitude >= 0x477ff000u);
  UVec is_nan = (UVec)(magnitude > 0x7f800000u);
  UVec half = (is_small & small) | (~is_small & normal);
  half = (is_big & 0x7c00u) | (~is_big & half);
  half = (is_nan & 0x7e00u) | (~is_nan & half);
  return __builtin_convertvector(half | sign, HVec);
#endif
}

// --- loads and stores ------------------------------------------------------------------------

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

template <class T>
inline Vec load(const T* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, p);
}
template <class T>
inline void store(T* p, Vec v) {
  HVec h = narrow(v, p);
  std::memcpy(p, &h, sizeof h);
}

// The last n < kLanes elements of a row; the other lanes are zero.
template <class T>
inline Vec load_tail(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = (1u << n) - 1u;
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(mask, p);
  else return widen((HVec)_mm256_maskz_loadu_epi16(mask, p), p);
#else
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
#endif
}
template <class T>
inline void store_tail(T* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = (1u << n) - 1u;
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, (__m512)v);
  else _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v, p));
#else
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
#endif
}

// Stores that bypass the cache, for outputs that are not read again soon: an ordinary store first
// reads the line it is about to overwrite. p must be aligned to the register's storage size.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
template <class T>
inline void stream(T* p, Vec v) {
  HVec h = narrow(v, p);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)h);
#else
  std::memcpy(p, &h, sizeof h);
#endif
}
template <class T>
inline bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}
inline void stream_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

// n elements, past the cache as far as whole registers go.
template <class T>
inline void copy_past_cache(T* to, const T* from, int64_t n) {
  int64_t d = 0;
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
    for (const int64_t step = 64 / sizeof(T); d + step <= n; d += step)
      _mm512_stream_si512((__m512i*)(to + d), _mm512_loadu_si512(from + d));
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0)
    for (const int64_t step = 32 / sizeof(T); d + step <= n; d += step)
      _mm256_stream_si256((__m256i*)(to + d), _mm256_loadu_si256((const __m256i*)(from + d)));
#endif
  std::memcpy(to + d, from + d, (n - d) * sizeof(T));
}

// --- arithmetic ------------------------------------------------------------------------------

// v rounded to the precision of T and back.
inline Vec round_to(Vec v, const float*) { return v; }
template <class T>
inline Vec round_to(Vec v, const T* type) {
  return widen(narrow(v, type), type);
}

// x * y + z and z - x * y with one rounding where the instruction set has it, for sums that no law
// describes.
inline Vec mul_add(Vec x, Vec y, Vec z) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}
inline Vec sub_mul(Vec z, Vec x, Vec y) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fnmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
  return (Vec)_mm256_fnmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return z - x * y;
#endif
}

inline float sum(Vec v) {  // fixed order: halves, then halves of halves
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// Calls body(offset, load, store) over a row of n elements: full registers, then one tail.
// `load` and `store` are Full or Tail below, so that a kernel is written once.
struct Full {
  template <class T>
  Vec get(const T* p) const { return load(p); }
  template <class T>
  void put(T* p, Vec v) const { store(p, v); }
};
struct Tail {
  int64_t n;
  template <class T>
  Vec get(const T* p) const { return load_tail(p, n); }
  template <class T>
  void put(T* p, Vec v) const { store_tail(p, v, n); }
};
template <class Body>
inline void for_row(int64_t n, Body&& body) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) body(d, Full{});
  if (d < n) body(d, Tail{n - d});
}

}  // namespace sora::SORA_ISA
