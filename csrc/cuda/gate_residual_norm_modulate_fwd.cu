// Forward kernels of gate_residual_norm_modulate: a row in the registers of its threads, or any row,
// whose sum is made three times.
#include "gated.h"
#include "norm_forward.h"

namespace sora::cuda {
namespace {

constexpr int kElements = 16;  // of a row, in the registers of one thread
constexpr int kMaxThreads = 512;

// The normed output of V columns, from the centred residual.
template <int V, class R>
SORA_D void output_columns(const GateResidualNormModulateFwd& a, int64_t row, int column, float rstd,
                           const R& round, float (&v)[V]) {
  using Out = typename R::Out;
  normed_columns<Out, V>(a, column, rstd, round.out, v);
  modulate<Out, V>(a.scale, a.scale_table, a.shift, a.shift_table, row, column, round.out, v);
}

template <class Tx, class Ty, class Tout>
__global__ void __launch_bounds__(kMaxThreads, 1) gate_residual_norm_modulate_fwd_row(
    const __grid_constant__ GateResidualNormModulateFwd a) {
  constexpr int V = kVector<Tx, Ty, Tout>, K = kElements / V;
  __shared__ TeamScratch<1> scratch;
  const int64_t n = team_number();
  if (n >= a.tokens) return;
  const Rounding<Tx, Ty, Tout> round(a);
  auto column = [](int k) { return team_column<V>(k); };
  const Tx* x = token_row<Tx>(a.x, n);
  Words<Tx, V> xs[K] = {};
  Words<Ty, V> ys[K][kMaxBranches] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (column(k) >= a.width) continue;
    xs[k] = fetch<Tx, V>(x + column(k));
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b)
      if (a.y[b].data) ys[k][b] = fetch<Ty, V>(token_row<Ty>(a.y[b], n) + column(k));
  }
  const int64_t row = row_of(a.rows, n);
  Tx* residual = static_cast<Tx*>(a.residual) + n * a.width;
  float v[K][V] = {};
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (column(k) >= a.width) continue;
    widen<Tx, V>(xs[k], v[k]);
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      if (!a.y[b].data) continue;
      float y[V], gate[V];
      widen<Ty, V>(ys[k][b], y);
      load_gate<V>(a, b, row, column(k), round, gate);
      add_branch<V>(a, b, gate, round, y, v[k]);
    }
    store<Tx, V>(residual + column(k), v[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += v[k][i];
  }
  const float rstd = centre_row(a, n, sum, v, scratch);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (column(k) >= a.width) continue;
    output_columns<V>(a, row, column(k), rstd, round, v[k]);
    store<Tout, V>(static_cast<Tout*>(a.normed) + n * a.width + column(k), v[k]);
  }
}

// Any width, address and type.
__global__ void __launch_bounds__(kMaxThreads, 1) gate_residual_norm_modulate_fwd_any(
    const __grid_constant__ GateResidualNormModulateFwd a) {
  __shared__ TeamScratch<1> scratch;
  const int64_t n = team_number();
  if (n >= a.tokens) return;
  const TypedRounding round(a);
  const int64_t row = row_of(a.rows, n);
  auto residual = [&](int c) { return any_residual(a, round, n, row, c); };
  const auto [mean, rstd] = row_statistics(a, n, residual, scratch);
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float v[1] = {residual(c)};
    store<1>(a.residual, a.x.type, n * a.width + c, v);
    v[0] -= mean;
    output_columns<1>(a, row, c, rstd, round, v);
    store<1>(a.normed, a.out_type, n * a.width + c, v);
  }
}

}  // namespace

void run_forward(const GateResidualNormModulateFwd& a, Stream stream) {
  const bool vectors = a.width <= kElements * kMaxThreads && inputs_fit(a);
  const dim3 block = row_threads(a.width, kElements, kMaxThreads);
  const dim3 grid(blocks_of(a.tokens, block.y));
  if (!vectors) return launch(gate_residual_norm_modulate_fwd_any, grid, block, 0, stream, a);
  by_types(a, [&](auto x, auto y, auto out) {
    launch(gate_residual_norm_modulate_fwd_row<decltype(x), decltype(y), decltype(out)>, grid, block,
           0, stream, a);
  });
}

}  // namespace sora::cuda
