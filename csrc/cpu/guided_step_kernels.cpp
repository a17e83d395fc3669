// Row kernels of guided_step. Compiled once per instruction set; no torch headers.
#include "guided_step.h"

#include "scratch.h"
#include "vec.h"

namespace sora::SORA_ISA {
namespace {

template <class Tx, class Tv>
void forward(const GuidedStepFwd& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = row_of(a.rows, n);
    const Vec guidance = splat(a.guidance[row]), weight = splat(a.weight[row]);
    const Tx* x = token_row<Tx>(a.x, n);
    const Tv* cond = token_row<Tv>(a.cond, n);
    const Tv* uncond = a.uncond.data ? token_row<Tv>(a.uncond, n) : nullptr;
    write_row(static_cast<Tx*>(a.out) + n * a.width, a.width, a.stream, [&](int64_t d, auto io) {
      Vec v = io.get(cond + d);
      if (uncond) {
        const Vec free = io.get(uncond + d);
        v = free + guidance * (v - free);
      }
      return io.get(x + d) + weight * v;
    });
  }
  if (a.stream) stream_fence();
}

template <class T>
inline void put(T* p, Vec v, bool past_cache, Full io) {
  if (past_cache) stream(p, v);
  else io.put(p, v);
}
template <class T>
inline void put(T* p, Vec v, bool, Tail io) { io.put(p, v); }

// Both gradients in one pass over dout.
template <class Tx, class Tv>
void backward(const GuidedStepBwd& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = row_of(a.rows, n);
    const Tx* dout = token_row<Tx>(a.dout, n);
    Tv* dcond = a.dcond ? static_cast<Tv*>(a.dcond) + n * a.width : nullptr;
    Tv* duncond = a.duncond ? static_cast<Tv*>(a.duncond) + n * a.width : nullptr;
    const float weight = a.weight[row], guidance = a.guided ? a.guidance[row] : 1.0f;
    const Vec by_cond = splat(weight * guidance), by_uncond = splat(weight * (1.0f - guidance));
    const bool past = a.stream && (!dcond || can_stream(dcond)) && (!duncond || can_stream(duncond));
    for_row(a.width, [&](int64_t d, auto io) {
      const Vec v = io.get(dout + d);
      if (dcond) put(dcond + d, by_cond * v, past, io);
      if (duncond) put(duncond + d, by_uncond * v, past, io);
    });
  }
  if (a.stream) stream_fence();
}

template <class Run>
void by_type(DType x, DType v, Run run) {
  if (x == DType::bf16) run(bf16{}, bf16{});
  else if (x == DType::f16) run(f16{}, f16{});
  else if (v == DType::bf16) run(float{}, bf16{});
  else if (v == DType::f16) run(float{}, f16{});
  else run(float{}, float{});
}

}  // namespace

void guided_step_fwd(const GuidedStepFwd& a, int64_t begin, int64_t end) {
  by_type(a.x.type, a.cond.type,
          [&](auto x, auto v) { forward<decltype(x), decltype(v)>(a, begin, end); });
}

void guided_step_bwd(const GuidedStepBwd& a, int64_t begin, int64_t end) {
  by_type(a.dout.type, a.type,
          [&](auto x, auto v) { backward<decltype(x), decltype(v)>(a, begin, end); });
}

}  // namespace sora::SORA_ISA
