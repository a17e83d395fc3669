// The gated residual of gate_residual_norm_modulate, which its forward and its backward both make.
#pragma once
#include "dispatch.h"
#include "gate_residual_norm_modulate.h"
#include "modulate.h"

namespace sora::cuda {

// What a law rounds to: the gated branch to the type of y, the residual to that of x, the rest to the
// type of the normed output.
template <class Tx, class Ty, class Tout>
struct Rounding {
  using X = Tx;
  using Y = Ty;
  using Out = Tout;
  int x, y, out;
  __device__ explicit Rounding(const GateResidualNormModulate& a) : x(a.law), y(a.law), out(a.law) {}
};
struct TypedRounding {
  using X = void;
  using Y = void;
  using Out = void;
  TypedLaw x, y, out;
  __device__ explicit TypedRounding(const GateResidualNormModulate& a)
      : x{a.law, a.x.type}, y{a.law, a.y_type}, out{a.law, a.out_type} {}
};

// The gate of branch b with its table, 1 without one.
template <int V, class R>
SORA_D void load_gate(const GateResidualNormModulate& a, int b, int64_t row, int column,
                      const R& round, float (&gate)[V]) {
  if (a.gate[b].data)
    return modulation<typename R::Y, V>(a.gate[b], a.gate_table[b], row, column, round.y, gate);
#pragma unroll
  for (int i = 0; i < V; ++i) gate[i] = 1.0f;
}

// residual += gate * y, of branch b.
template <int V, class R>
SORA_D void add_branch(const GateResidualNormModulate& a, int b, const float (&gate)[V],
                       const R& round, const float (&y)[V], float (&residual)[V]) {
  float gated[V];
#pragma unroll
  for (int i = 0; i < V; ++i) gated[i] = a.gate[b].data ? gate[i] * y[i] : y[i];
  if (a.gate[b].data) round_at<typename R::Y, V>(round.y, kGated, gated);
#pragma unroll
  for (int i = 0; i < V; ++i) residual[i] += gated[i];
  round_at<typename R::X, V>(round.x, kResidual, residual);
}

// The residual of one column, from memory of any type.
SORA_D float any_residual(const GateResidualNormModulate& a, const TypedRounding& round, int64_t n,
                          int64_t row, int c) {
  float residual[1] = {load_one(a.x, n, c)};
#pragma unroll
  for (int b = 0; b < kMaxBranches; ++b) {
    if (!a.y[b].data) continue;
    float gate[1];
    const float y[1] = {load_one(a.y[b], n, c)};
    load_gate<1>(a, b, row, c, round, gate);
    add_branch<1>(a, b, gate, round, y, residual);
  }
  return residual[0];
}

// run(x{}, y{}, out{}): half precision gives itself; beside an fp32 x, y may be any type and the
// output that of x or y.
template <class Run>
void by_types(const GateResidualNormModulate& a, Run run) {
  auto by_out = [&](auto half) {
    if (a.out_type == DType::f32) run(float{}, half, float{});
    else run(float{}, half, half);
  };
  if (a.x.type == DType::bf16) run(bf16{}, bf16{}, bf16{});
  else if (a.x.type == DType::f16) run(f16{}, f16{}, f16{});
  else if (a.y_type == DType::bf16) by_out(bf16{});
  else if (a.y_type == DType::f16) by_out(f16{});
  else run(float{}, float{}, float{});
}

inline bool inputs_fit(const GateResidualNormModulate& a) {
  return vectors_fit(a.width, a.x, a.y[0], a.y[1], a.gate[0], a.gate[1], a.gate_table[0],
                     a.gate_table[1], a.shift, a.scale, a.shift_table, a.scale_table, a.weight,
                     a.bias);
}

}  // namespace sora::cuda
