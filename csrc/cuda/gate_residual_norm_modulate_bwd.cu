// Backward kernels of gate_residual_norm_modulate. The gradients of the norm's parameters, and that of
// its input, are those of norm_backward.h; with dr = dresidual + the latter,
// dx = dr, dy = gate * dr, dgate += dr * y.
#include "gated.h"
#include "norm_backward.h"

namespace sora::cuda {
namespace {

using Args = GateResidualNormModulateBwd;

// Running sums of V columns. Gates and scales are loaded again for every token, out of the cache: there
// are no registers left for them.
template <int V, bool All>
struct Columns {
  static constexpr int kBranches = All ? kMaxBranches : 1;
  ModulationSums<V, 1, All> norm;
  float dgate[kBranches][V];

  __device__ __forceinline__ void start_row() {
    norm.start_row();
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
#pragma unroll
      for (int i = 0; i < V; ++i) dgate[b][i] = 0.0f;
    }
  }
  __device__ __forceinline__ void flush_row(const Args& a, const TokenBlock& block, int64_t row,
                                            int column) const {
#pragma unroll
    for (int b = 0; b < kBranches; ++b)
      if (a.dgate[b].grad.result) flush<V>(a.dgate[b], block, row, a.width, column, dgate[b]);
    norm.flush_row(&a.dshift, &a.dscale, block, row, a.width, column);
  }
};

// Of one token whose residual is in xhat: makes that xhat and turns g, the upstream gradient, into h.
template <int V, bool All, class R>
SORA_D void norm_columns(const Args& a, int64_t row, int column, float mean, float rstd,
                         const R& round, ModulationSums<V, 1, All>* sums, float (&xhat)[V],
                         float (&g)[V]) {
  using Out = typename R::Out;
  float dnormed[1][V], scale[1][V];
#pragma unroll
  for (int i = 0; i < V; ++i) xhat[i] = (xhat[i] - mean) * rstd, dnormed[0][i] = g[i];
  load_scale<Out, V>(a, a.scale, row, column, round.out, scale[0]);
  backward_columns<Out>(a, 1, xhat, dnormed, scale, column, round.out, sums, g);
}

SORA_HD bool wants_dr(const Args& a) {
  return a.dx || a.dy[0] || a.dy[1] || a.dgate[0].grad.result || a.dgate[1].grad.result;
}

// A thread's pieces of a token: for each of its K vectors x, dresidual, dnormed, then y of every branch.
template <class Tx, class Ty, class Tout, bool All>
struct Layout {
  static constexpr int V = kVector<Tx, Ty, Tout>, K = kElements / V;
  static constexpr int B = Columns<V, All>::kBranches;
  static constexpr int kX = kPieces<Tx, V>, kY = kPieces<Ty, V>, kOut = kPieces<Tout, V>;
  static constexpr int kVectorPieces = 2 * kX + kOut + B * kY, kAll = K * kVectorPieces;
  SORA_HD constexpr int x(int k) { return k * kVectorPieces; }
  SORA_HD constexpr int dresidual(int k) { return x(k) + kX; }
  SORA_HD constexpr int dnormed(int k) { return x(k) + 2 * kX; }
  SORA_HD constexpr int y(int k, int b) { return x(k) + 2 * kX + kOut + b * kY; }
};

// Everything in one pass: whole rows, 16 bytes at a time, one block of sorted tokens per blockDim.x
// threads.
template <class Tx, class Ty, class Tout, bool All>
__global__ void __launch_bounds__(kMaxThreads<All>, 1) gate_residual_norm_modulate_bwd_row(
    const __grid_constant__ Args a, int size, const __grid_constant__ AheadPlan plan) {
  using L = Layout<Tx, Ty, Tout, All>;
  constexpr int V = L::V, K = L::K, B = L::B;
  // Registers that do not hold the upstream gradient until the sums are made: 96 do for bf16 alone,
  // 168 not beside eight fp32 numbers. It is then read later, and so is the next token asked for.
  constexpr bool kLate = All ? sizeof(Tx) == 4 && V == 8 : !std::is_same_v<Tx, bf16>;
  static_assert(kThreadBytes<L::kAll> * kMaxThreads<All> <= kAllShared);
  __shared__ TeamScratch<2> scratch;
  const TokenBlock block = token_block(team_number(), a.tokens, size);
  if (block.start == block.stop) return;
  const Rounding<Tx, Ty, Tout> round(a);
  auto column = [](int k) { return team_column<V>(k); };
  Columns<V, All> columns[K];
#pragma unroll
  for (int k = 0; k < K; ++k) columns[k].norm.start_block();
  auto change = [&](int64_t before, int64_t row) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      if (before >= 0) columns[k].flush_row(a, block, before, column(k));
      if (row >= 0) columns[k].start_row();
    }
  };
  Ahead<L::kAll> ahead(plan);
  auto rows = [&](int n) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      ahead.template ask<Tx, V>(L::x(k), row_at<Tx>(a.x, n) + column(k));
      ahead.template ask<Tout, V>(L::dnormed(k), row_at<Tout>(a.dnormed, n) + column(k));
      if (a.dresidual.data)
        ahead.template ask<Tx, V>(L::dresidual(k), row_at<Tx>(a.dresidual, n) + column(k));
#pragma unroll
      for (int b = 0; b < B; ++b)
        if (a.y[b].data)
          ahead.template ask<Ty, V>(L::y(k, b), row_at<Ty>(a.y[b], n) + column(k));
    }
  };
#pragma unroll 1
  for (int i = 0; i < plan.tokens; ++i) ask(ahead, a, block, block.start + i, rows);
  walk(a.rows, block, change, [&](int position, int64_t n, int64_t row) {
    ahead.wait();
    const float mean = ahead.mean(a), rstd = ahead.rstd();
    Words<Tx, V> xs[K], dresiduals[K] = {};
    Words<Ty, V> ys[K][B] = {};
    Words<Tout, V> dnormed[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      xs[k] = ahead.template take<Tx, V>(L::x(k));
      dnormed[k] = ahead.template take<Tout, V>(L::dnormed(k));
#pragma unroll
      for (int b = 0; b < B; ++b)
        if (a.y[b].data) ys[k][b] = ahead.template take<Ty, V>(L::y(k, b));
    }
    auto take_the_rest = [&] {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (a.dresidual.data) dresiduals[k] = ahead.template take<Tx, V>(L::dresidual(k));
      ask(ahead, a, block, position + plan.tokens, rows);
    };
    if (!kLate) take_the_rest();
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
        load_gate<V>(a, b, row, column(k), round, gate);
        add_branch<V>(a, b, gate, round, y, xhat[k]);
      }
      widen<Tout, V>(dnormed[k], h[k]);
      norm_columns(a, row, column(k), mean, rstd, round, &columns[k].norm, xhat[k], h[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        means[0] += h[k][i];
        means[1] = fmaf(h[k][i], xhat[k][i], means[1]);
      }
    }
    if (kLate) take_the_rest();
    if (!wants_dr(a)) return;
    team_means(a, means, scratch, position & 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      const int64_t at = n * a.width + column(k);
      float dr[V];
      widen<Tx, V>(dresiduals[k], dr);  // zero without one
#pragma unroll
      for (int i = 0; i < V; ++i) dr[i] += norm_gradient(rstd, h[k][i], xhat[k][i], means);
      if (a.dx) store<Tx, V>(static_cast<Tx*>(a.dx) + at, dr);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        float v[V];
        widen<Ty, V>(ys[k][b], v);
#pragma unroll
        for (int i = 0; i < V; ++i)
          columns[k].dgate[b][i] = fmaf(dr[i], v[i], columns[k].dgate[b][i]);
        if (!a.dy[b]) continue;
        load_gate<V>(a, b, row, column(k), round, v);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] *= dr[i];
        store<Ty, V>(static_cast<Ty*>(a.dy[b]) + at, v);
      }
    }
  });
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (column(k) < a.width)
      columns[k].norm.flush_block(a.dweight, a.dbias, block, a.width, column(k));
}

__global__ void __launch_bounds__(kAnyThreads, 1) gate_residual_norm_modulate_bwd_means(
    const __grid_constant__ Args a) {
  __shared__ TeamScratch<2> scratch;
  const int64_t n = team_number();
  if (n >= a.tokens) return;
  const TypedRounding round(a);
  const int64_t row = row_of(a.rows, n);
  ModulationSums<1, 1, true>* none = nullptr;
  auto columns = [&](int c, float mean, float rstd, float(&xhat)[1], float(&h)[1]) {
    xhat[0] = any_residual(a, round, n, row, c);
    h[0] = load_one(a.dnormed, n, c);
    norm_columns(a, row, c, mean, rstd, round, none, xhat, h);
  };
  write_means(a, n, a.means, columns, scratch);
}

__global__ void __launch_bounds__(kAnyThreads, 1) gate_residual_norm_modulate_bwd_any(
    const __grid_constant__ Args a, int size) {
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (c >= a.width) return;
  const TypedRounding round(a);
  const TokenBlock block = token_block(blockIdx.x, a.tokens, size);
  Columns<1, true> column;
  column.norm.start_block();
  auto change = [&](int64_t before, int64_t row) {
    if (before >= 0) column.flush_row(a, block, before, c);
    if (row >= 0) column.start_row();
  };
  walk(a.rows, block, change, [&](int64_t, int64_t n, int64_t row) {
    const float rstd = a.rstd[n];
    float xhat[1] = {any_residual(a, round, n, row, c)}, h[1] = {load_one(a.dnormed, n, c)};
    norm_columns(a, row, c, mean_of(a, n), rstd, round, &column.norm, xhat, h);
    if (!wants_dr(a)) return;
    const int64_t at = n * a.width + c;
    const float means[2] = {a.means[2 * n], a.means[2 * n + 1]};
    float dr[1] = {norm_gradient(rstd, h[0], xhat[0], means)};
    if (a.dresidual.data) dr[0] += load_one(a.dresidual, n, c);
    if (a.dx) store<1>(a.dx, a.x.type, at, dr);
#pragma unroll
    for (int b = 0; b < kMaxBranches; ++b) {
      if (a.y[b].data) column.dgate[b][0] += dr[0] * load_one(a.y[b], n, c);
      if (!a.dy[b]) continue;
      float dy[1];
      load_gate<1>(a, b, row, c, round, dy);
      dy[0] *= dr[0];
      store<1>(a.dy[b], a.y_type, at, dy);
    }
  });
  column.norm.flush_block(a.dweight, a.dbias, block, a.width, c);
}

bool needs_all(const Args& a) {
  return a.y[1].data || a.gate[1].data || a.dy[1] || a.dweight.grad.result || a.dbias.grad.result;
}

}  // namespace

bool holds_row(const Args& a) {
  const int threads = needs_all(a) ? kMaxThreads<true> : kMaxThreads<false>;
  return a.width <= kElements * threads && inputs_fit(a) &&
         vectors_fit(a.width, a.dresidual, a.dnormed);
}

void run_backward(const Args& a, Stream stream) {
  const int size = block_tokens(a.tokens);
  if (!holds_row(a)) {
    launch_any(gate_residual_norm_modulate_bwd_means, gate_residual_norm_modulate_bwd_any, a,
               wants_dr(a), size, stream);
  } else {
    by_types(a, [&](auto x, auto y, auto out) {
      using Tx = decltype(x);
      using Ty = decltype(y);
      using Tout = decltype(out);
      auto launch_as = [&](auto all) {
        constexpr bool kAll = decltype(all)::value;
        launch_row<Layout<Tx, Ty, Tout, kAll>::kAll>(
            gate_residual_norm_modulate_bwd_row<Tx, Ty, Tout, kAll>, a, kMaxThreads<kAll>, size,
            stream);
      };
      if (needs_all(a)) launch_as(std::true_type{});
      else launch_as(std::false_type{});
    });
  }
  FinishSums finish{a.tokens, size, a.width};
  for (const GroupedSum* g :
       {&a.dgate[0], &a.dgate[1], &a.dshift, &a.dscale, &a.dweight, &a.dbias})
    finish.add(*g);
  finish_sums(finish, stream);
}

}  // namespace sora::cuda
