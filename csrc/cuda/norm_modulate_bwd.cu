// Backward kernels of norm_modulate; the formulas are in norm_backward.h.
#include "dispatch.h"
#include "norm_backward.h"
#include "norm_modulate.h"

namespace sora::cuda {
namespace {

using Args = NormModulateBwd;

template <bool All>
constexpr int kOutputs = All ? kMaxOutputs : 1;

// 1 + scale of one row at V columns, of every output.
template <class T, int V, int O, class Law>
SORA_D void load_scales(const Args& a, int64_t row, int column, Law law, float (&scales)[O][V]) {
#pragma unroll
  for (int o = 0; o < O; ++o) load_scale<T, V>(a, a.scale[o], row, column, law, scales[o]);
}

// A thread's pieces of a token: for each of its K vectors x, then dy of every output.
template <class Tin, class Tout, bool All>
struct Layout {
  static constexpr int V = kVector<Tin, Tout>, K = kElements / V, O = kOutputs<All>;
  static constexpr int kX = kPieces<Tin, V>, kDy = kPieces<Tout, V>, kVectorPieces = kX + O * kDy;
  SORA_HD constexpr int x(int k) { return k * kVectorPieces; }
  SORA_HD constexpr int dy(int k, int o) { return x(k) + kX + o * kDy; }
  static constexpr int kAll = K * kVectorPieces;
};

// Everything in one pass: whole rows, 16 bytes at a time, one block of sorted tokens per blockDim.x
// threads.
template <class Tin, class Tout, bool All>
__global__ void __launch_bounds__(kMaxThreads<All>, 1) norm_modulate_bwd_row(
    const __grid_constant__ Args a, int size, const __grid_constant__ AheadPlan plan) {
  using L = Layout<Tin, Tout, All>;
  constexpr int V = L::V, K = L::K, O = L::O;
  static_assert(kThreadBytes<L::kAll> * kMaxThreads<All> <= kAllShared);
  __shared__ TeamScratch<2> scratch;
  const TokenBlock block = token_block(team_number(), a.tokens, size);
  if (block.start == block.stop) return;
  auto column = [](int k) { return team_column<V>(k); };
  ModulationSums<V, O, All> sums[K];
  float scales[K][O][V];
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k].start_block();
  auto change = [&](int64_t before, int64_t row) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      if (before >= 0) sums[k].flush_row(a.dshift, a.dscale, block, before, a.width, column(k));
      if (row < 0) continue;
      load_scales<Tout, V, O>(a, row, column(k), a.law, scales[k]);
      sums[k].start_row();
    }
  };
  Ahead<L::kAll> ahead(plan);
  auto rows = [&](int n) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      ahead.template ask<Tin, V>(L::x(k), row_at<Tin>(a.x, n) + column(k));
#pragma unroll
      for (int o = 0; o < O; ++o)
        if (o < a.outputs)
          ahead.template ask<Tout, V>(L::dy(k, o), row_at<Tout>(a.dy[o], n) + column(k));
    }
  };
#pragma unroll 1
  for (int i = 0; i < plan.tokens; ++i) ask(ahead, a, block, block.start + i, rows);
  walk(a.rows, block, change, [&](int position, int64_t n, int64_t) {
    ahead.wait();
    const float mean = ahead.mean(a), rstd = ahead.rstd();
    Words<Tin, V> xs[K];
    Words<Tout, V> dys[K][O];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      xs[k] = ahead.template take<Tin, V>(L::x(k));
#pragma unroll
      for (int o = 0; o < O; ++o) dys[k][o] = ahead.template take<Tout, V>(L::dy(k, o));
    }
    ask(ahead, a, block, position + plan.tokens, rows);
    float xhat[K][V] = {}, h[K][V] = {}, means[2] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      float g[O][V];
      widen<Tin, V>(xs[k], xhat[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) xhat[k][i] = (xhat[k][i] - mean) * rstd;
#pragma unroll
      for (int o = 0; o < O; ++o) widen<Tout, V>(dys[k][o], g[o]);
      backward_columns<Tout>(a, a.outputs, xhat[k], g, scales[k], column(k), a.law, &sums[k], h[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        means[0] += h[k][i];
        means[1] = fmaf(h[k][i], xhat[k][i], means[1]);
      }
    }
    if (!a.dx) return;
    team_means(a, means, scratch, position & 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      float dx[V];
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] = norm_gradient(rstd, h[k][i], xhat[k][i], means);
      store<Tin, V>(static_cast<Tin*>(a.dx) + n * a.width + column(k), dx);
    }
  });
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (column(k) < a.width) sums[k].flush_block(a.dweight, a.dbias, block, a.width, column(k));
}

// One column of one token, from memory of any type: its xhat, sums and h.
using Sums = ModulationSums<1, kMaxOutputs, true>;
SORA_D void any_column(const Args& a, int64_t n, int c, float mean, float rstd,
                       const float (&scales)[kMaxOutputs][1], Sums* sums, float (&xhat)[1],
                       float (&h)[1]) {
  float g[kMaxOutputs][1];
  xhat[0] = (load_one(a.x, n, c) - mean) * rstd;
#pragma unroll
  for (int o = 0; o < kMaxOutputs; ++o) g[o][0] = o < a.outputs ? load_one(a.dy[o], n, c) : 0.0f;
  backward_columns<void>(a, a.outputs, xhat, g, scales, c, TypedLaw{a.law, a.out_type}, sums, h);
}

__global__ void __launch_bounds__(kAnyThreads, 1) norm_modulate_bwd_means(
    const __grid_constant__ Args a) {
  __shared__ TeamScratch<2> scratch;
  const int64_t n = team_number();
  if (n >= a.tokens) return;
  const int64_t row = row_of(a.rows, n);
  auto columns = [&](int c, float mean, float rstd, float(&xhat)[1], float(&h)[1]) {
    float scales[kMaxOutputs][1];
    load_scales<void, 1, kMaxOutputs>(a, row, c, TypedLaw{a.law, a.out_type}, scales);
    any_column(a, n, c, mean, rstd, scales, nullptr, xhat, h);
  };
  write_means(a, n, a.means, columns, scratch);
}

__global__ void __launch_bounds__(kAnyThreads, 1) norm_modulate_bwd_any(
    const __grid_constant__ Args a, int size) {
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (c >= a.width) return;
  const TokenBlock block = token_block(blockIdx.x, a.tokens, size);
  Sums sums;
  float scales[kMaxOutputs][1];
  sums.start_block();
  auto change = [&](int64_t before, int64_t row) {
    if (before >= 0) sums.flush_row(a.dshift, a.dscale, block, before, a.width, c);
    if (row < 0) return;
    load_scales<void, 1, kMaxOutputs>(a, row, c, TypedLaw{a.law, a.out_type}, scales);
    sums.start_row();
  };
  walk(a.rows, block, change, [&](int64_t, int64_t n, int64_t) {
    const float rstd = a.rstd[n];
    float xhat[1], h[1];
    any_column(a, n, c, mean_of(a, n), rstd, scales, &sums, xhat, h);
    if (!a.dx) return;
    const float means[2] = {a.means[2 * n], a.means[2 * n + 1]};
    const float dx[1] = {norm_gradient(rstd, h[0], xhat[0], means)};
    store<1>(a.dx, a.x.type, n * a.width + c, dx);
  });
  sums.flush_block(a.dweight, a.dbias, block, a.width, c);
}

bool needs_all(const Args& a) {
  return a.outputs > 1 || a.dweight.grad.result || a.dbias.grad.result;
}

}  // namespace

bool holds_row(const Args& a) {
  const int threads = needs_all(a) ? kMaxThreads<true> : kMaxThreads<false>;
  return a.width <= kElements * threads &&
         vectors_fit(a.width, a.x, a.weight, a.bias, a.scale_table, a.scale[0], a.scale[1], a.dy[0],
                     a.dy[1]);
}

void run_backward(const Args& a, Stream stream) {
  const int size = block_tokens(a.tokens);
  if (!holds_row(a)) {
    launch_any(norm_modulate_bwd_means, norm_modulate_bwd_any, a, a.dx != nullptr, size, stream);
  } else {
    by_type(a.x.type, a.out_type, [&](auto in, auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      auto launch_as = [&](auto all) {
        constexpr bool kAll = decltype(all)::value;
        launch_row<Layout<In, Out, kAll>::kAll>(norm_modulate_bwd_row<In, Out, kAll>, a,
                                                kMaxThreads<kAll>, size, stream);
      };
      if (needs_all(a)) launch_as(std::true_type{});
      else launch_as(std::false_type{});
    });
  }
  FinishSums finish{a.tokens, size, a.width};
  for (const GroupedSum* g : {&a.dweight, &a.dbias, &a.dshift[0], &a.dscale[0], &a.dshift[1],
                              &a.dscale[1]})
    finish.add(*g);
  finish_sums(finish, stream);
}

}  // namespace sora::cuda
