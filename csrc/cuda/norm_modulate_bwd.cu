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
// What the registers of all running sums allow: two of them, or all six.
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
template <class T, int V, int Outputs>
SORA_D void load_scales(const NormModulateBwd& a, int64_t row, int column,
                        float (&scales)[Outputs][V]) {
#pragma unroll
  for (int o = 0; o < Outputs; ++o) {
    if (a.scale[o].data) {
      one_plus<T, V>(a.scale[o], a.scale_table, row, column, a.law, scales[o]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) scales[o][i] = 1.0f;
    }
  }
}

// V columns of one token: adds to the sums, and gives xhat and h.
template <class Tin, class Tout, int V, bool All>
SORA_D void backward_columns(const NormModulateBwd& a, const float (&x)[V], const Tout* const* dy,
                             float mean, float rstd,
                             const float (&scales)[Running<V, All>::kOutputs][V], int column,
                             Running<V, All>* sums, float (&xhat)[V], float (&h)[V]) {
  float normed[V], rounded_xhat[V];
#pragma unroll
  for (int i = 0; i < V; ++i) rounded_xhat[i] = xhat[i] = (x[i] - mean) * rstd, h[i] = 0.0f;
  round_at<Tout, V>(a.law, kXhat, rounded_xhat);
#pragma unroll
  for (int i = 0; i < V; ++i) normed[i] = rounded_xhat[i];
  affine<Tout, V>(a.weight, a.bias, column, a.law, normed);
#pragma unroll
  for (int o = 0; o < Running<V, All>::kOutputs; ++o) {
    if (o >= a.outputs) continue;
    float g[V];
    load<Tout, V>(dy[o] + column, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (sums) sums->dshift[o][i] += g[i], sums->dscale[o][i] += g[i] * normed[i];
      h[i] += g[i] * scales[o][i];
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

template <class Tin, int V>
SORA_D void write_dx(const NormModulateBwd& a, int64_t n, int column, float rstd, float c1, float c2,
                     const float (&xhat)[V], const float (&h)[V]) {
  float dx[V];
#pragma unroll
  for (int i = 0; i < V; ++i) dx[i] = rstd * (h[i] - c1 - xhat[i] * c2);
  store<Tin, V>(static_cast<Tin*>(a.dx) + n * a.width + column, dx);
}

template <class Tout>
SORA_D void dy_rows(const NormModulateBwd& a, int64_t n, const Tout* (&dy)[kMaxOutputs]) {
#pragma unroll
  for (int o = 0; o < kMaxOutputs; ++o) dy[o] = o < a.outputs ? token_row<Tout>(a.dy[o], n) : nullptr;
}

// Everything in one pass: whole rows, 16 bytes at a time, one block of sorted tokens per blockDim.x
// threads.
template <class Tin, class Tout, bool All>
__global__ void __launch_bounds__(kMaxThreads<All>) norm_modulate_bwd_row(
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
  for (int64_t position = block.start; position < block.stop; ++position) {
    const int64_t n = token_at(a.rows, position), wanted = row_of(a.rows, n);
    const Tin* x = token_row<Tin>(a.x, n);
    const Tout* dy[kMaxOutputs];
    dy_rows(a, n, dy);
    const float mean = a.mean ? a.mean[n] : 0.0f, rstd = a.rstd[n];
    float xhat[K][V] = {}, h[K][V] = {}, means[2] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= a.width) continue;
      if (wanted != row) {
        if (row >= 0) sums[k].flush_row(a, block, row, column(k));
        load_scales<Tout, V, O>(a, wanted, column(k), scales[k]);
        sums[k].start_row();
      }
      float values[V];
      load<Tin, V>(x + column(k), values);
      backward_columns<Tin, Tout, V, All>(a, values, dy, mean, rstd, scales[k], column(k), &sums[k],
                                          xhat[k], h[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) means[0] += h[k][i], means[1] += h[k][i] * xhat[k][i];
    }
    row = wanted;
    if (!a.dx) continue;
    team_sum<2>(means, scratch, static_cast<int>(position & 1));
    const float c1 = a.mean ? means[0] * inverse : 0.0f, c2 = means[1] * inverse;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (column(k) < a.width) write_dx<Tin, V>(a, n, column(k), rstd, c1, c2, xhat[k], h[k]);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (column(k) >= a.width) continue;
    sums[k].flush_row(a, block, row, column(k));
    sums[k].flush_block(a, block, column(k));
  }
}

// Any width, any address. First the two means of every row that dx needs ...
template <class Tin, class Tout>
__global__ void __launch_bounds__(kAnyThreads) norm_modulate_bwd_means(
    const __grid_constant__ NormModulateBwd a) {
  __shared__ TeamScratch<2> scratch;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.tokens) return;
  const int64_t row = row_of(a.rows, n);
  const Tin* x = token_row<Tin>(a.x, n);
  const Tout* dy[kMaxOutputs];
  dy_rows(a, n, dy);
  const float mean = a.mean ? a.mean[n] : 0.0f, rstd = a.rstd[n];
  float sum[2] = {};
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float scales[kMaxOutputs][1], value[1], xhat[1], h[1];
    load_scales<Tout, 1, kMaxOutputs>(a, row, c, scales);
    load<Tin, 1>(x + c, value);
    backward_columns<Tin, Tout, 1, true>(a, value, dy, mean, rstd, scales, c, nullptr, xhat, h);
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
template <class Tin, class Tout>
__global__ void __launch_bounds__(kAnyThreads) norm_modulate_bwd_any(
    const __grid_constant__ NormModulateBwd a, int64_t size) {
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (c >= a.width) return;
  const TokenBlock block = token_block(blockIdx.x, a.tokens, size);
  Running<1, true> sums;
  float scales[kMaxOutputs][1];
  sums.start_block();
  int64_t row = -1;
  for (int64_t position = block.start; position < block.stop; ++position) {
    const int64_t n = token_at(a.rows, position), wanted = row_of(a.rows, n);
    if (wanted != row) {
      if (row >= 0) sums.flush_row(a, block, row, c);
      load_scales<Tout, 1, kMaxOutputs>(a, row = wanted, c, scales);
      sums.start_row();
    }
    const Tout* dy[kMaxOutputs];
    dy_rows(a, n, dy);
    const float rstd = a.rstd[n];
    float value[1], xhat[1], h[1];
    load<Tin, 1>(token_row<Tin>(a.x, n) + c, value);
    backward_columns<Tin, Tout, 1, true>(a, value, dy, a.mean ? a.mean[n] : 0.0f, rstd, scales, c,
                                         &sums, xhat, h);
    if (a.dx) write_dx<Tin, 1>(a, n, c, rstd, a.means[2 * n], a.means[2 * n + 1], xhat, h);
  }
  sums.flush_row(a, block, row, c);
  sums.flush_block(a, block, c);
}

bool needs_all(const NormModulateBwd& a) {
  return a.outputs > 1 || a.dweight.grad.result || a.dbias.grad.result;
}

template <class Tin, class Tout>
void launch_any(const NormModulateBwd& a, int64_t size, Stream stream) {
  if (a.dx) {
    const dim3 block = row_threads(a.width, kElements, kAnyThreads);
    launch(norm_modulate_bwd_means<Tin, Tout>, dim3(blocks_of(a.tokens, block.y)), block, 0, stream,
           a);
  }
  const int threads = a.width < kAnyThreads ? round_up(a.width, kWarp) : kAnyThreads;
  launch(norm_modulate_bwd_any<Tin, Tout>,
         dim3(blocks_of(a.tokens, size), blocks_of(a.width, threads)), dim3(threads), 0, stream, a,
         size);
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
  by_type(a.x.type, a.out_type, [&](auto in, auto out) {
    using Tin = decltype(in);
    using Tout = decltype(out);
    if (!norm_modulate_bwd_holds_row(a)) return launch_any<Tin, Tout>(a, size, stream);
    const bool all = needs_all(a);
    const dim3 block =
        row_threads(a.width, kElements, all ? kMaxThreads<true> : kMaxThreads<false>);
    launch(all ? norm_modulate_bwd_row<Tin, Tout, true> : norm_modulate_bwd_row<Tin, Tout, false>,
           dim3(blocks_of(a.tokens, size * block.y)), block, 0, stream, a, size);
  });
  FinishSums finish{a.tokens, size, a.width};
  for (const GroupedSum* g : {&a.dweight, &a.dbias, &a.dshift[0], &a.dscale[0], &a.dshift[1],
                              &a.dscale[1]})
    finish.add(*g);
  finish_sums(finish, stream);
}

}  // namespace sora::cuda
