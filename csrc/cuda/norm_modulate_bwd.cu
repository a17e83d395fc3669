// Backward kernels of norm_modulate. With n = xhat * weight + bias and g = dy * (1 + scale):
// dshift += dy, dscale += dy * n, dweight += g * xhat, dbias += g, and for h = g * weight
// dx = rstd * (h - mean(h) - xhat * mean(h * xhat))   (RMS: without mean(h)).
#include "dispatch.h"
#include "grouped_sum.h"
#include "modulate.h"
#include "norm_modulate.h"
#include "reduce.h"

namespace sora::cuda {
namespace {

constexpr int kElements = 8;  // of a row, in the registers of one thread
// What the registers of the running sums allow: of all six, or two.
template <bool All>
constexpr int kMaxThreads = All ? 384 : 640;
constexpr int kAnyThreads = 256;

// Running sums of V columns; without All, those of one plain modulation.
template <int V, bool All>
struct Running {
  static constexpr int kOutputs = All ? kMaxOutputs : 1;
  float dshift[kOutputs][V], dscale[kOutputs][V], dweight[V], dbias[V];

  __device__ __forceinline__ void start_block() {
#pragma unroll
    for (int i = 0; i < V; ++i) dweight[i] = dbias[i] = 0.0f;
  }
  __device__ __forceinline__ void start_row() {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int i = 0; i < V; ++i) dshift[o][i] = dscale[o][i] = 0.0f;
    }
  }
  __device__ __forceinline__ void flush_row(const NormModulateBwd& a, const TokenBlock& block,
                                            int64_t row, int column) const {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      if (a.dshift[o].grad.result) flush<V>(a.dshift[o], block, row, a.width, column, dshift[o]);
      if (a.dscale[o].grad.result) flush<V>(a.dscale[o], block, row, a.width, column, dscale[o]);
    }
  }
  __device__ __forceinline__ void flush_block(const NormModulateBwd& a, const TokenBlock& block,
                                              int column) const {
    if constexpr (All) {
      if (a.dweight.grad.result) flush<V>(a.dweight, block, 0, a.width, column, dweight);
      if (a.dbias.grad.result) flush<V>(a.dbias, block, 0, a.width, column, dbias);
    }
  }
};

// 1 + scale of one row at V columns.
template <class T, int V, int Outputs, class Law>
SORA_D void load_scales(const NormModulateBwd& a, int64_t row, int column, Law law,
                        float (&scales)[Outputs][V]) {
#pragma unroll
  for (int o = 0; o < Outputs; ++o) {
    if (a.scale[o].data) {
      one_plus<T, V>(a.scale[o], a.scale_table, row, column, law, scales[o]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) scales[o][i] = 1.0f;
    }
  }
}

// V columns of one token, of which xhat and the upstream gradients g are given: adds to the sums, and
// gives h.
template <class T, int V, bool All, class Law>
SORA_D void backward_columns(const NormModulateBwd& a, const float (&xhat)[V],
                             const float (&g)[Running<V, All>::kOutputs][V],
                             const float (&scales)[Running<V, All>::kOutputs][V], int column,
                             Law law, Running<V, All>* sums, float (&h)[V]) {
  float normed[V], rounded_xhat[V];
#pragma unroll
  for (int i = 0; i < V; ++i) rounded_xhat[i] = xhat[i], h[i] = 0.0f;
  round_at<T, V>(law, kXhat, rounded_xhat);
#pragma unroll
  for (int i = 0; i < V; ++i) normed[i] = rounded_xhat[i];
  affine<T, V>(a.weight, a.bias, column, law, normed);
#pragma unroll
  for (int o = 0; o < Running<V, All>::kOutputs; ++o) {
    if (o >= a.outputs) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (sums) sums->dshift[o][i] += g[o][i], sums->dscale[o][i] += g[o][i] * normed[i];
      h[i] += g[o][i] * scales[o][i];
    }
  }
  if (All && sums) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums->dweight[i] += h[i] * rounded_xhat[i], sums->dbias[i] += h[i];
  }
  if (a.weight.data) {
    float weight[V];
    load<V>(a.weight, 0, column, weight);
#pragma unroll
    for (int i = 0; i < V; ++i) h[i] *= weight[i];
  }
}

SORA_D float dx_of(float rstd, float h, float xhat, float c1, float c2) {
  return rstd * (h - c1 - xhat * c2);
}

// Everything in one pass: whole rows, 16 bytes at a time, one block of sorted tokens per blockDim.x
// threads.
template <class Tin, class Tout, bool All>
__global__ void __launch_bounds__(kMaxThreads<All>, 1) norm_modulate_bwd_row(
    const __grid_constant__ NormModulateBwd a, int64_t size) {
  constexpr int V = kVector<Tin, Tout>, K = kElements / V, O = Running<V, All>::kOutputs;
  __shared__ TeamScratch<2> scratch;
  const TokenBlock block =
      token_block(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, a.tokens, size);
  if (block.start >= a.tokens) return;
  auto column = [&](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x) * V; };
  Running<V, All> sums[K];
  float scales[K][O][V];
  const float inverse = 1.0f / static_cast<float>(a.width);
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k].start_block();
  int64_t row = -1;
  for (int64_t position = block.start;; ++position) {
    const bool end = position == block.stop;
    const int64_t n = end ? 0 : token_at(a.rows, position), wanted = end ? -1 : row_of(a.rows, n);
    if (wanted != row) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (column(k) >= a.width) continue;
        if (row >= 0) sums[k].flush_row(a, block, row, column(k));
        if (end) continue;
        load_scales<Tout, V, O>(a, wanted, column(k), a.law, scales[k]);
        sums[k].start_row();
      }
      row = wanted;
    }
    if (end) break;
    const Tin* x = token_row<Tin>(a.x, n);
    Words<Tin, V> xs[K] = {};
    Words<Tout, V> dys[K][O] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      xs[k] = fetch<Tin, V>(x + column(k));
#pragma unroll
      for (int o = 0; o < O; ++o)
        if (o < a.outputs) dys[k][o] = fetch<Tout, V>(token_row<Tout>(a.dy[o], n) + column(k));
    }
    const float mean = a.mean ? a.mean[n] : 0.0f, rstd = a.rstd[n];
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
      backward_columns<Tout, V, All>(a, xhat[k], g, scales[k], column(k), a.law, &sums[k], h[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) means[0] += h[k][i], means[1] += h[k][i] * xhat[k][i];
    }
    if (!a.dx) continue;
    team_sum<2>(means, scratch, static_cast<int>(position & 1));
    const float c1 = a.mean ? means[0] * inverse : 0.0f, c2 = means[1] * inverse;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      float dx[V];
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] = dx_of(rstd, h[k][i], xhat[k][i], c1, c2);
      store<Tin, V>(static_cast<Tin*>(a.dx) + n * a.width + column(k), dx);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (column(k) < a.width) sums[k].flush_block(a, block, column(k));
}

// One column of one token: what `backward_columns` wants, from memory of any type.
SORA_D void load_column(const NormModulateBwd& a, int64_t n, int c, float mean, float rstd,
                        float (&xhat)[1], float (&g)[kMaxOutputs][1]) {
  xhat[0] = (load_one(a.x, n, c) - mean) * rstd;
#pragma unroll
  for (int o = 0; o < kMaxOutputs; ++o) g[o][0] = o < a.outputs ? load_one(a.dy[o], n, c) : 0.0f;
}

// Any width, address and type. First the two means of every row that dx needs ...
__global__ void __launch_bounds__(kAnyThreads, 1) norm_modulate_bwd_means(
    const __grid_constant__ NormModulateBwd a) {
  __shared__ TeamScratch<2> scratch;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.tokens) return;
  const TypedLaw law{a.law, a.out_type};
  const int64_t row = row_of(a.rows, n);
  const float mean = a.mean ? a.mean[n] : 0.0f, rstd = a.rstd[n];
  float sum[2] = {};
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float scales[kMaxOutputs][1], g[kMaxOutputs][1], xhat[1], h[1];
    load_scales<void, 1, kMaxOutputs>(a, row, c, law, scales);
    load_column(a, n, c, mean, rstd, xhat, g);
    backward_columns<void, 1, true>(a, xhat, g, scales, c, law, nullptr, h);
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
__global__ void __launch_bounds__(kAnyThreads, 1) norm_modulate_bwd_any(
    const __grid_constant__ NormModulateBwd a, int64_t size) {
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (c >= a.width) return;
  const TypedLaw law{a.law, a.out_type};
  const TokenBlock block = token_block(blockIdx.x, a.tokens, size);
  Running<1, true> sums;
  float scales[kMaxOutputs][1];
  sums.start_block();
  int64_t row = -1;
  for (int64_t position = block.start; position < block.stop; ++position) {
    const int64_t n = token_at(a.rows, position), wanted = row_of(a.rows, n);
    if (wanted != row) {
      if (row >= 0) sums.flush_row(a, block, row, c);
      load_scales<void, 1, kMaxOutputs>(a, row = wanted, c, law, scales);
      sums.start_row();
    }
    const float rstd = a.rstd[n];
    float xhat[1], g[kMaxOutputs][1], h[1];
    load_column(a, n, c, a.mean ? a.mean[n] : 0.0f, rstd, xhat, g);
    backward_columns<void, 1, true>(a, xhat, g, scales, c, law, &sums, h);
    if (!a.dx) continue;
    const float dx[1] = {dx_of(rstd, h[0], xhat[0], a.means[2 * n], a.means[2 * n + 1])};
    store<1>(a.dx, a.x.type, n * a.width + c, dx);
  }
  sums.flush_row(a, block, row, c);
  sums.flush_block(a, block, c);
}

bool needs_all(const NormModulateBwd& a) {
  return a.outputs > 1 || a.dweight.grad.result || a.dbias.grad.result;
}

void launch_any(const NormModulateBwd& a, int64_t size, Stream stream) {
  if (a.dx) {
    const dim3 block = row_threads(a.width, kElements, kAnyThreads);
    launch(norm_modulate_bwd_means, dim3(blocks_of(a.tokens, block.y)), block, 0, stream, a);
  }
  const int threads = a.width < kAnyThreads ? round_up(a.width, kWarp) : kAnyThreads;
  launch(norm_modulate_bwd_any, dim3(blocks_of(a.tokens, size), blocks_of(a.width, threads)),
         dim3(threads), 0, stream, a, size);
}

template <class Tin, class Tout, bool All>
void launch_row(const NormModulateBwd& a, int64_t size, Stream stream) {
  const dim3 block = row_threads(a.width, kElements, kMaxThreads<All>);
  launch(norm_modulate_bwd_row<Tin, Tout, All>, dim3(blocks_of(a.tokens, size * block.y)), block, 0,
         stream, a, size);
}

}  // namespace

bool norm_modulate_bwd_holds_row(const NormModulateBwd& a) {
  const int threads = needs_all(a) ? kMaxThreads<true> : kMaxThreads<false>;
  return a.width <= kElements * threads &&
         vectors_fit(a.width, a.x, a.weight, a.bias, a.scale_table, a.scale[0], a.scale[1], a.dy[0],
                     a.dy[1]);
}

void norm_modulate_bwd(const NormModulateBwd& a, Stream stream) {
  const int64_t size = block_tokens(a.tokens);
  if (!norm_modulate_bwd_holds_row(a)) {
    launch_any(a, size, stream);
  } else {
    by_type(a.x.type, a.out_type, [&](auto in, auto out) {
      if (needs_all(a)) launch_row<decltype(in), decltype(out), true>(a, size, stream);
      else launch_row<decltype(in), decltype(out), false>(a, size, stream);
    });
  }
  FinishSums finish{a.tokens, size, a.width};
  for (const GroupedSum* g : {&a.dweight, &a.dbias, &a.dshift[0], &a.dscale[0], &a.dshift[1],
                              &a.dscale[1]})
    finish.add(*g);
  finish_sums(finish, stream);
}

}  // namespace sora::cuda
