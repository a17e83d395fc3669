// Row kernels of bias_gelu. Compiled once per instruction set; no torch headers.
#include "bias_gelu.h"

#include "grouped_sum.h"
#include "scratch.h"
#include "tanh.h"
#include "vec.h"

namespace sora::SORA_ISA {
namespace {

static_assert(kBlockTokens == kGeluBlock && kColumns == kGeluColumns);

constexpr float kTwoC = 1.5957691216f;   // 2 sqrt(2 / pi)
constexpr float kCubic = 0.071354816f;   // 2 sqrt(2 / pi) * 0.044715

// s = (1 + tanh(z)) / 2 = 1 / (1 + e^-2z), for 2z = u (kTwoC + kCubic u^2), and s (1 - s). From the
// smaller of s and 1 - s, in which nothing cancels.
struct HalfGate {
  Vec s, slope;
};

inline HalfGate half_gate(Vec u, Vec square) {
  const Vec twice = u * (splat(kTwoC) + splat(kCubic) * square);
  const Vec a = (Vec)((UVec)twice & 0x7fffffffu);
  const Vec bounded = select((IVec)(a < splat(80.0f)), a, splat(80.0f));
  const Vec small = splat(1.0f) / (splat(1.0f) + exp_positive(bounded));
  const Vec large = splat(1.0f) - small;
  return {select((IVec)(twice < splat(0.0f)), small, large), small * large};
}

template <class Io, class T>
inline Vec biased(const T* x, const float* bias, int64_t d, Io io) {
  const Vec v = io.get(x + d);
  return bias ? v + io.get(bias + d) : v;
}

template <class T>
void forward(const BiasGeluFwd& a, int64_t begin, int64_t end) {
  const float* bias = a.bias;
  for (int64_t n = begin; n < end; ++n) {
    const T* x = token_row<T>(a.x, n);
    write_row(static_cast<T*>(a.y) + n * a.width, a.width, a.stream, [&](int64_t d, auto io) {
      const Vec u = biased(x, bias, d, io);
      return u * half_gate(u, u * u).s;
    });
  }
  if (a.stream) stream_fence();
}

// dx = dy (s + u s (1 - s) (2z)'), with s the half gate; dbias += dx.
template <class T>
void backward(const BiasGeluBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 1);
  float* dbias = a.dbias_partial ? scratch.row() : nullptr;
  const float* bias = a.bias;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockTokens;
    const int64_t stop = start + kBlockTokens < a.tokens ? start + kBlockTokens : a.tokens;
    if (dbias) std::memset(dbias, 0, a.width * sizeof(float));
    for (int64_t n = start; n < stop; ++n) {
      const T* x = token_row<T>(a.x, n);
      const T* dy = token_row<T>(a.dy, n);
      write_row(static_cast<T*>(a.dx) + n * a.width, a.width, a.stream, [&](int64_t d, auto io) {
        const Vec u = biased(x, bias, d, io);
        const Vec square = u * u;
        const HalfGate gate = half_gate(u, square);
        const Vec inner = u * (splat(kTwoC) + splat(3.0f * kCubic) * square);
        const Vec dx = io.get(dy + d) * (gate.s + gate.slope * inner);
        if (dbias) io.put(dbias + d, io.get(dbias + d) + dx);
        return dx;
      });
    }
    if (dbias) std::memcpy(a.dbias_partial + block * a.width, dbias, a.width * sizeof(float));
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

// Units [begin, end) of kColumns columns each.
void bias_gelu_bwd_finish(const BiasGeluBwd& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.tokens + kBlockTokens - 1) / kBlockTokens;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t column = unit * kColumns;
    const int64_t n = column + kColumns < a.width ? kColumns : a.width - column;
    finish_columns(a.dbias_partial, blocks, a.width, column, n, a.dbias);
  }
}

}  // namespace sora::SORA_ISA
