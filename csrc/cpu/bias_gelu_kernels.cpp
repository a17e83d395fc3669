// Row kernels of bias_gelu. Compiled once per instruction set; no torch headers.
#include "bias_gelu.h"

#include "grouped_sum.h"
#include "pair.h"
#include "sigmoid.h"

namespace sora::SORA_ISA {
namespace {


constexpr float kTwoC = 1.5957691216f;   // 2 sqrt(2 / pi)
constexpr float kCubic = 0.071354816f;   // 2 sqrt(2 / pi) * 0.044715

// s = (1 + tanh(z)) / 2 = sigmoid(2z), 2z = u (kTwoC + kCubic u^2), and 1 - s.
inline Gate half_gate(Vec u, Vec square) {
  return gate_of(u * mul_add(splat(kExponent * kCubic), square, splat(kExponent * kTwoC)));
}
inline Vec gelu(Vec u) { return u * half_gate(u, u * u).s; }
inline Pair gelu(Pair u) { return {gelu(u.a), gelu(u.b)}; }

// s + u s (1 - s) (2z)'
inline Vec gelu_slope(Vec u) {
  const Vec square = u * u;
  const Gate g = half_gate(u, square);
  const Vec inner = u * mul_add(splat(3.0f * kCubic), square, splat(kTwoC));
  return mul_add(g.s * g.rest, inner, g.s);
}
inline Pair gelu_slope(Pair u) { return {gelu_slope(u.a), gelu_slope(u.b)}; }

// The bias in the order of pairs of T, or null.
template <class T>
const float* arranged_bias(const BiasGelu& a, Scratch& scratch) {
  if (!a.bias) return nullptr;
  float* row = scratch.row();
  arrange<T>(row, a.bias, a.width);
  return row;
}

template <class Io, class T>
inline Pair biased(const T* x, const float* bias, int64_t d, Io io) {
  const Pair v = io.get(x + d);
  return bias ? v + load_pair(bias + d) : v;
}

template <class T>
void forward(const BiasGeluFwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 1);
  const float* bias = arranged_bias<T>(a, scratch);
  for (int64_t n = begin; n < end; ++n) {
    const T* x = token_row<T>(a.x, n);
    write_pairs(static_cast<T*>(a.y) + n * a.width, a.width, a.stream,
                [&](int64_t d, auto io) { return gelu(biased(x, bias, d, io)); });
  }
  if (a.stream) stream_fence();
}

// dx = dy times the slope; dbias += dx.
template <class T>
void backward(const BiasGeluBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 2);
  const float* bias = arranged_bias<T>(a, scratch);
  float* dbias = a.dbias.result ? scratch.row() : nullptr;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockTokens;
    const int64_t stop = start + kBlockTokens < a.tokens ? start + kBlockTokens : a.tokens;
    if (dbias) std::memset(dbias, 0, whole_pairs(a.width) * sizeof(float));
    for (int64_t n = start; n < stop; ++n) {
      const T* x = token_row<T>(a.x, n);
      const T* dy = token_row<T>(a.dy, n);
      write_pairs(static_cast<T*>(a.dx) + n * a.width, a.width, a.stream, [&](int64_t d, auto io) {
        const Pair dx = io.get(dy + d) * gelu_slope(biased(x, bias, d, io));
        if (dbias) store_pair(dbias + d, load_pair(dbias + d) + dx);
        return dx;
      });
    }
    if (dbias) disarrange<T>(a.dbias.partial + block * a.width, dbias, a.width);
  }
  if (a.stream) stream_fence();
}

template <class Run>
void by_type(DType type, Run run) {
  if (type == DType::bf16) run(bf16{});
  else if (type == DType::f16) run(f16{});
  else run(float{});
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& a, int64_t begin, int64_t end) {
  by_type(a.x.type, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void bias_gelu_bwd(const BiasGeluBwd& a, int64_t begin, int64_t end) {
  by_type(a.x.type, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

void bias_gelu_bwd_finish(const BiasGeluBwd& a, int64_t begin, int64_t end) {
  const RowGrad none;
  finish_sums({&a.dbias}, {&none}, {}, a.tokens, a.width, begin, end);
}

}  // namespace sora::SORA_ISA
