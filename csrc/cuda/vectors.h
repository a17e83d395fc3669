// V neighbouring numbers of a row: 16 bytes at a time where all addresses of a call allow it (V = 4 or
// 8), else one by one (V = 1). Arithmetic is fp32; `fetch` keeps the bits as they are stored, so that
// several loads are under way before the first is converted.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "rows.h"

#define SORA_D static __device__ __forceinline__

namespace sora::cuda {

// Numbers per vector: 16 bytes of the narrowest type.
template <class... T>
constexpr int kVector = ((sizeof(T) == 4) && ...) ? 4 : 8;

// --- whether vectors fit; asked by the host, for all tensors of a call ---------------------------------

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline bool fits(const Tokens& t) {
  const int64_t size = size_of(t.type);
  return !t.data || (on_16_bytes(t.data) && t.batch_stride * size % 16 == 0 &&
                     t.token_stride * size % 16 == 0);
}
inline bool fits(const Matrix& m) {
  return !m.data || (on_16_bytes(m.data) && m.stride * size_of(m.type) % 16 == 0);
}
template <class... Inputs>
bool vectors_fit(int width, const Inputs&... inputs) {
  return width % 8 == 0 && (fits(inputs) && ...);
}

// --- one number -------------------------------------------------------------------------------------------

SORA_D float low(uint32_t word, const bf16*) { return __uint_as_float(word << 16); }
SORA_D float high(uint32_t word, const bf16*) { return __uint_as_float(word & 0xffff0000u); }
SORA_D float low(uint32_t word, const f16*) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
}
SORA_D float high(uint32_t word, const f16*) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
SORA_D uint32_t bits_of(float v, const bf16*) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
SORA_D uint32_t bits_of(float v, const f16*) { return __half_as_ushort(__float2half_rn(v)); }

SORA_D float rounded(float v, const float*) { return v; }
template <class T>
SORA_D float rounded(float v, const T* type) {
  return low(bits_of(v, type), type);
}

// --- V numbers ----------------------------------------------------------------------------------------------

template <class T, int V>
struct Words {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T)), kCount = (kBytes + 3) / 4;
  uint32_t word[kCount];
};

template <class T, int V>
SORA_D Words<T, V> fetch(const T* p) {
  using W = Words<T, V>;
  W r;
  if constexpr (W::kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < W::kCount; i += 4) {
      const uint4 u = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      r.word[i] = u.x, r.word[i + 1] = u.y, r.word[i + 2] = u.z, r.word[i + 3] = u.w;
    }
  } else if constexpr (W::kBytes == 8) {
    const uint2 u = __ldg(reinterpret_cast<const uint2*>(p));
    r.word[0] = u.x, r.word[1] = u.y;
  } else if constexpr (W::kBytes == 4) {
    r.word[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
  } else {
    static_assert(V == 1);
    r.word[0] = __ldg(reinterpret_cast<const unsigned short*>(p));
  }
  return r;
}

// Memory that will be read soon.
SORA_D void prefetch(const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

template <class T, int V>
SORA_D void widen(const Words<T, V>& r, float (&out)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const T* type = nullptr;
    if constexpr (sizeof(T) == 4) out[i] = __uint_as_float(r.word[i]);
    else out[i] = i % 2 == 0 ? low(r.word[i / 2], type) : high(r.word[i / 2], type);
  }
}

template <class T, int V>
SORA_D void load(const T* p, float (&out)[V]) {
  widen<T, V>(fetch<T, V>(p), out);
}

template <class T, int V>
SORA_D void store(T* p, const float (&v)[V]) {
  using W = Words<T, V>;
  W r;
#pragma unroll
  for (int i = 0; i < W::kCount; ++i) {
    if constexpr (sizeof(T) == 4) r.word[i] = __float_as_uint(v[i]);
    else if constexpr (V == 1) r.word[i] = bits_of(v[i], p);
    else r.word[i] = bits_of(v[2 * i], p) | bits_of(v[2 * i + 1], p) << 16;
  }
  if constexpr (W::kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < W::kCount; i += 4)
      reinterpret_cast<uint4*>(p)[i / 4] =
          make_uint4(r.word[i], r.word[i + 1], r.word[i + 2], r.word[i + 3]);
  } else if constexpr (W::kBytes == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(r.word[0], r.word[1]);
  } else if constexpr (W::kBytes == 4) {
    *reinterpret_cast<uint32_t*>(p) = r.word[0];
  } else {
    *reinterpret_cast<unsigned short*>(p) = static_cast<unsigned short>(r.word[0]);
  }
}

// --- types that are known at run time only --------------------------------------------------------------------

// V numbers at element `at`.
template <int V>
SORA_D void load(const void* data, DType type, int64_t at, float (&out)[V]) {
  if (type == DType::f32) load<float, V>(static_cast<const float*>(data) + at, out);
  else if (type == DType::bf16) load<bf16, V>(static_cast<const bf16*>(data) + at, out);
  else load<f16, V>(static_cast<const f16*>(data) + at, out);
}

template <int V>
SORA_D void store(void* data, DType type, int64_t at, const float (&v)[V]) {
  if (type == DType::f32) store<float, V>(static_cast<float*>(data) + at, v);
  else if (type == DType::bf16) store<bf16, V>(static_cast<bf16*>(data) + at, v);
  else store<f16, V>(static_cast<f16*>(data) + at, v);
}

// V numbers of row `row` of a matrix (row 0 of a vector, whose stride is 0).
template <int V>
SORA_D void load(const Matrix& m, int64_t row, int column, float (&out)[V]) {
  load<V>(m.data, m.type, row * m.stride + column, out);
}

// One number of token n.
SORA_D float load_one(const Tokens& t, int64_t n, int column) {
  const int64_t batch = quotient(n, t.per_batch);
  float v[1];
  load<1>(t.data, t.type,
          batch * t.batch_stride + (n - batch * t.per_batch) * t.token_stride + column, v);
  return v[0];
}

}  // namespace sora::cuda
