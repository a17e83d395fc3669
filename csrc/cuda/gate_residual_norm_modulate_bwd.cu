// Backward kernels of gate_residual_norm_modulate. With n = xhat * weight + bias and
// g = dnormed * (1 + scale): dshift += dnormed, dscale += dnormed * n, dweight += g * xhat, dbias += g;
// for h = g * weight the whole gradient of the residual is
// dr = dresidual + rstd * (h - mean(h) - xhat * mean(h * xhat))   (RMS: without mean(h)),
// and dx = dr, dy = gate * dr, dgate += dr * y.
#include "gated.h"
#include "grouped_sum.h"
#include "reduce.h"

namespace sora::cuda {
namespace {

using Args = GateResidualNormModulateBwd;

constexpr int kElements = 8;  // of a row, in the registers of one thread
// What the registers of the running sums allow: of all six, or of one branch and its modulation.
template <bool All>
constexpr int kMaxThreads = All ? 384 : 640;
constexpr int kAnyThreads = 256;

// Running sums of V columns. Gates and scales are loaded again for every token, out of the cache: there
// are no registers left for them.
template <int V, bool All>
struct Columns {
  static constexpr int kBranches = All ? kMaxBranches : 1;
  float dgate[kBranches][V], dshift[V], dscale[V], dweight[V], dbias[V];

  __device__ __forceinline__ void start_block() {
#pragma unroll
    for (int i = 0; i < V; ++i) dweight[i] = dbias[i] = 0.0f;
  }
  __device__ __forceinline__ void start_row() {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dshift[i] = dscale[i] = 0.0f;
#pragma unroll
      for (int b = 0; b < kBranches; ++b) dgate[b][i] = 0.0f;
    }
  }
  __device__ __forceinline__ void flush_row(const Args& a, const TokenBlock& block, int64_t row,
                                            int column) const {
#pragma unroll
    for (int b = 0; b < kBranches; ++b)
      if (a.dgate[b].grad.result) flush<V>(a.dgate[b], block, row, a.width, column, dgate[b]);
    if (a.dshift.grad.result) flush<V>(a.dshift, block, row, a.width, column, dshift);
    if (a.dscale.grad.result) flush<V>(a.dscale, block, row, a.width, column, dscale);
  }
  __device__ __forceinline__ void flush_block(const Args& a, const TokenBlock& block,
                                              int column) const {
    if constexpr (All) {
      if (a.dweight.grad.result) flush<V>(a.dweight, block, 0, a.width, column, dweight);
      if (a.dbias.grad.result) flush<V>(a.dbias, block, 0, a.width, column, dbias);
    }
  }

  // Of one token whose residual is in xhat: makes that xhat and turns g, the upstream gradient, into h.
  template <class R>
  __device__ __forceinline__ void norm_backward(const Args& a, int64_t row, int column, float mean,
                                                float rstd, const R& round, float (&xhat)[V],
                                                float (&g)[V]) {
    using Out = typename R::Out;
    float rounded_xhat[V], normed[V], scale[V];
#pragma unroll
    for (int i = 0; i < V; ++i) rounded_xhat[i] = xhat[i] = (xhat[i] - mean) * rstd, scale[i] = 1.0f;
    round_at<Out, V>(round.out, kXhat, rounded_xhat);
#pragma unroll
    for (int i = 0; i < V; ++i) normed[i] = rounded_xhat[i];
    affine<Out, V>(a.weight, a.bias, column, round.out, normed);
    if (a.scale.data) one_plus<Out, V>(a.scale, a.scale_table, row, column, round.out, scale);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dshift[i] += g[i];
      dscale[i] += g[i] * normed[i];
      g[i] *= scale[i];
      if constexpr (All) dweight[i] += g[i] * rounded_xhat[i], dbias[i] += g[i];
    }
    if (a.weight.data) {
      float weight[V];
      load<V>(a.weight, 0, column, weight);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] *= weight[i];
    }
  }
};

// The gate of branch b, 1 without one.
template <int V, class R>
SORA_D void gate_of(const Args& a, int b, int64_t row, int column, const R& round,
                    float (&gate)[V]) {
  if (a.gate[b].data) return load_gate<V>(a, b, row, column, round, gate);
#pragma unroll
  for (int i = 0; i < V; ++i) gate[i] = 1.0f;
}

SORA_HD bool wants_dr(const Args& a) {
  return a.dx || a.dy[0] || a.dy[1] || a.dgate[0].grad.result || a.dgate[1].grad.result;
}

// Everything in one pass: whole rows, 16 bytes at a time, one block of sorted tokens per blockDim.x
// threads.
template <class Tx, class Ty, class Tout, bool All>
__global__ void __launch_bounds__(kMaxThreads<All>, 1) gate_residual_norm_modulate_bwd_row(
    const __grid_constant__ Args a, int64_t size) {
  constexpr int V = kVector<Tx, Ty, Tout>, K = kElements / V, B = Columns<V, All>::kBranches;
  // Eight fp32 numbers of the upstream gradient do not fit in registers until they are needed.
  constexpr bool kLate = sizeof(Tx) == 4 && V == 8;
  __shared__ TeamScratch<2> scratch;
  const TokenBlock block =
      token_block(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, a.tokens, size);
  if (block.start >= a.tokens) return;
  const Rounding<Tx, Ty, Tout> round(a);
  auto column = [&](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x) * V; };
  Columns<V, All> columns[K];
#pragma unroll
  for (int k = 0; k < K; ++k) columns[k].start_block();
  int64_t row = -1;
  for (int64_t position = block.start;; ++position) {
    const bool end = position == block.stop;
    const int64_t n = end ? 0 : token_at(a.rows, position), wanted = end ? -1 : row_of(a.rows, n);
    if (wanted != row) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (column(k) >= a.width) continue;
        if (row >= 0) columns[k].flush_row(a, block, row, column(k));
        if (!end) columns[k].start_row();
      }
      row = wanted;
    }
    if (end) break;
    Words<Tx, V> xs[K] = {}, dresiduals[K] = {};
    Words<Ty, V> ys[K][B] = {};
    Words<Tout, V> dnormed[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      dnormed[k] = fetch<Tout, V>(token_row<Tout>(a.dnormed, n) + column(k));
      xs[k] = fetch<Tx, V>(token_row<Tx>(a.x, n) + column(k));
#pragma unroll
      for (int b = 0; b < B; ++b)
        if (a.y[b].data) ys[k][b] = fetch<Ty, V>(token_row<Ty>(a.y[b], n) + column(k));
      if (!kLate && a.dresidual.data)
        dresiduals[k] = fetch<Tx, V>(token_row<Tx>(a.dresidual, n) + column(k));
    }
    const float mean = a.mean ? a.mean[n] : 0.0f, rstd = a.rstd[n];
    float xhat[K][V] = {}, h[K][V] = {}, means[2] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      widen<Tx, V>(xs[k], xhat[k]);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (!a.y[b].data) continue;
        float y[V], gate[V];
        widen<Ty, V>(ys[k][b], y);
        gate_of<V>(a, b, row, column(k), round, gate);
        add_branch<V>(a, b, gate, round, y, xhat[k]);
      }
      widen<Tout, V>(dnormed[k], h[k]);
      columns[k].norm_backward(a, row, column(k), mean, rstd, round, xhat[k], h[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) means[0] += h[k][i], means[1] += h[k][i] * xhat[k][i];
    }
    if (!wants_dr(a)) continue;
    team_sum<2>(means, scratch, static_cast<int>(position & 1));
    const float inverse = 1.0f / static_cast<float>(a.width);
    const float c1 = a.mean ? means[0] * inverse : 0.0f, c2 = means[1] * inverse;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      const int64_t at = n * a.width + column(k);
      if (kLate && a.dresidual.data)
        dresiduals[k] = fetch<Tx, V>(token_row<Tx>(a.dresidual, n) + column(k));
      float dr[V];
      widen<Tx, V>(dresiduals[k], dr);  // zero without one
#pragma unroll
      for (int i = 0; i < V; ++i) dr[i] += rstd * (h[k][i] - c1 - xhat[k][i] * c2);
      if (a.dx) store<Tx, V>(static_cast<Tx*>(a.dx) + at, dr);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        float v[V];
        widen<Ty, V>(ys[k][b], v);
#pragma unroll
        for (int i = 0; i < V; ++i) columns[k].dgate[b][i] += dr[i] * v[i];
        if (!a.dy[b]) continue;
        gate_of<V>(a, b, row, column(k), round, v);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] *= dr[i];
        store<Ty, V>(static_cast<Ty*>(a.dy[b]) + at, v);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (column(k) < a.width) columns[k].flush_block(a, block, column(k));
}

// The residual and the upstream gradient of one column, from memory of any type.
SORA_D void load_column(const Args& a, const TypedRounding& round, int64_t n, int64_t row, int c,
                        float (&residual)[1], float (&g)[1]) {
  residual[0] = load_one(a.x, n, c);
  g[0] = load_one(a.dnormed, n, c);
#pragma unroll
  for (int b = 0; b < kMaxBranches; ++b) {
    if (!a.y[b].data) continue;
    float gate[1];
    gate_of<1>(a, b, row, c, round, gate);
    const float y[1] = {load_one(a.y[b], n, c)};
    add_branch<1>(a, b, gate, round, y, residual);
  }
}

// Any width, address and type. First the two means of every row that dr needs ...
__global__ void __launch_bounds__(kAnyThreads, 1) gate_residual_norm_modulate_bwd_means(
    const __grid_constant__ Args a) {
  __shared__ TeamScratch<2> scratch;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.tokens) return;
  const TypedRounding round(a);
  const int64_t row = row_of(a.rows, n);
  const float mean = a.mean ? a.mean[n] : 0.0f, rstd = a.rstd[n];
  float sum[2] = {};
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    Columns<1, true> column;
    column.start_block();
    column.start_row();
    float xhat[1], h[1];
    load_column(a, round, n, row, c, xhat, h);
    column.norm_backward(a, row, c, mean, rstd, round, xhat, h);
    sum[0] += h[0];
    sum[1] += h[0] * xhat[0];
  }
  team_sum<2>(sum, scratch, 0);
  if (threadIdx.x == 0) {
    const float inverse = 1.0f / static_cast<float>(a.width);
    a.means[2 * n] = a.mean ? sum[0] * inverse : 0.0f;
    a.means[2 * n + 1] = sum[1] * inverse;
  }
}

// ... then everything else, which is the columns' own: one thread per column and block of tokens.
__global__ void __launch_bounds__(kAnyThreads, 1) gate_residual_norm_modulate_bwd_any(
    const __grid_constant__ Args a, int64_t size) {
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (c >= a.width) return;
  const TypedRounding round(a);
  const TokenBlock block = token_block(blockIdx.x, a.tokens, size);
  Columns<1, true> column;
  column.start_block();
  int64_t row = -1;
  for (int64_t position = block.start; position < block.stop; ++position) {
    const int64_t n = token_at(a.rows, position), wanted = row_of(a.rows, n);
    if (wanted != row) {
      if (row >= 0) column.flush_row(a, block, row, c);
      column.start_row();
      row = wanted;
    }
    const float rstd = a.rstd[n];
    float xhat[1], h[1];
    load_column(a, round, n, row, c, xhat, h);
    column.norm_backward(a, row, c, a.mean ? a.mean[n] : 0.0f, rstd, round, xhat, h);
    if (!wants_dr(a)) continue;
    const int64_t at = n * a.width + c;
    float dr[1] = {rstd * (h[0] - a.means[2 * n] - xhat[0] * a.means[2 * n + 1])};
    if (a.dresidual.data) dr[0] += load_one(a.dresidual, n, c);
    if (a.dx) store<1>(a.dx, a.x.type, at, dr);
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      if (a.y[b].data) column.dgate[b][0] += dr[0] * load_one(a.y[b], n, c);
      if (!a.dy[b]) continue;
      float dy[1];
      gate_of<1>(a, b, row, c, round, dy);
      dy[0] *= dr[0];
      store<1>(a.dy[b], a.y_type, at, dy);
    }
  }
  column.flush_row(a, block, row, c);
  column.flush_block(a, block, c);
}

bool needs_all(const Args& a) {
  return a.y[1].data || a.gate[1].data || a.dy[1] || a.dweight.grad.result || a.dbias.grad.result;
}

void launch_any(const Args& a, int64_t size, Stream stream) {
  if (wants_dr(a)) {
    const dim3 block = row_threads(a.width, kElements, kAnyThreads);
    launch(gate_residual_norm_modulate_bwd_means, dim3(blocks_of(a.tokens, block.y)), block, 0,
           stream, a);
  }
  const int threads = a.width < kAnyThreads ? round_up(a.width, kWarp) : kAnyThreads;
  launch(gate_residual_norm_modulate_bwd_any,
         dim3(blocks_of(a.tokens, size), blocks_of(a.width, threads)), dim3(threads), 0, stream, a,
         size);
}

template <class Tx, class Ty, class Tout, bool All>
void launch_row(const Args& a, int64_t size, Stream stream) {
  const dim3 block = row_threads(a.width, kElements, kMaxThreads<All>);
  launch(gate_residual_norm_modulate_bwd_row<Tx, Ty, Tout, All>,
         dim3(blocks_of(a.tokens, size * block.y)), block, 0, stream, a, size);
}

}  // namespace

bool gate_residual_norm_modulate_bwd_holds_row(const Args& a) {
  const int threads = needs_all(a) ? kMaxThreads<true> : kMaxThreads<false>;
  return a.width <= kElements * threads && inputs_fit(a) &&
         vectors_fit(a.width, a.dresidual, a.dnormed);
}

void gate_residual_norm_modulate_bwd(const Args& a, Stream stream) {
  const int64_t size = block_tokens(a.tokens);
  if (!gate_residual_norm_modulate_bwd_holds_row(a)) {
    launch_any(a, size, stream);
  } else {
    by_types(a, [&](auto x, auto y, auto out) {
      using Tx = decltype(x);
      using Ty = decltype(y);
      using Tout = decltype(out);
      if (needs_all(a)) launch_row<Tx, Ty, Tout, true>(a, size, stream);
      else launch_row<Tx, Ty, Tout, false>(a, size, stream);
    });
  }
  FinishSums finish{a.tokens, size, a.width};
  for (const GroupedSum* g :
       {&a.dgate[0], &a.dgate[1], &a.dshift, &a.dscale, &a.dweight, &a.dbias})
    finish.add(*g);
  finish_sums(finish, stream);
}

}  // namespace sora::cuda
