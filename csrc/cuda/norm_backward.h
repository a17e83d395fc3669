// What the backwards of ops with a norm and a modulation share. With n = xhat * weight + bias and
// g = dy * (1 + scale): dshift += dy, dscale += dy * n, dweight += g * xhat, dbias += g, and for
// h = g * weight the gradient of the norm's input is
// rstd * (h - mean(h) - xhat * mean(h * xhat))   (RMS: without mean(h)).
#pragma once
#include "ahead.h"
#include "grouped_sum.h"
#include "norm_forward.h"

namespace sora::cuda {

constexpr int kElements = 8;  // of a row, in the registers of one thread
// What the registers of the running sums allow: of all that there are, or of the usual ones.
template <bool All>
constexpr int kMaxThreads = All ? 384 : 640;
constexpr int kAnyThreads = 256;

// Running sums of V columns for the gradients of O modulations and, with All, of weight and bias.
template <int V, int O, bool All>
struct ModulationSums {
  float dshift[O][V], dscale[O][V], dweight[V], dbias[V];

  __device__ __forceinline__ void start_block() {
#pragma unroll
    for (int i = 0; i < V; ++i) dweight[i] = dbias[i] = 0.0f;
  }
  __device__ __forceinline__ void start_row() {
#pragma unroll
    for (int o = 0; o < O; ++o) {
#pragma unroll
      for (int i = 0; i < V; ++i) dshift[o][i] = dscale[o][i] = 0.0f;
    }
  }
  __device__ __forceinline__ void flush_row(const GroupedSum* shift, const GroupedSum* scale,
                                            const TokenBlock& block, int64_t row, int width,
                                            int column) const {
#pragma unroll
    for (int o = 0; o < O; ++o) {
      if (shift[o].grad.result) flush<V>(shift[o], block, row, width, column, dshift[o]);
      if (scale[o].grad.result) flush<V>(scale[o], block, row, width, column, dscale[o]);
    }
  }
  __device__ __forceinline__ void flush_block(const GroupedSum& weight, const GroupedSum& bias,
                                              const TokenBlock& block, int width,
                                              int column) const {
    if constexpr (All) {
      if (weight.grad.result) flush<V>(weight, block, 0, width, column, dweight);
      if (bias.grad.result) flush<V>(bias, block, 0, width, column, dbias);
    }
  }
};

// 1 + scale of one row at V columns, 1 without a scale.
template <class T, int V, class Law>
SORA_D void load_scale(const Normed& a, const Matrix& scale, int64_t row, int column, Law law,
                       float (&out)[V]) {
  if (scale.data) return one_plus<T, V>(scale, a.scale_table, row, column, law, out);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = 1.0f;
}

// V columns of one token, of which xhat and the upstream gradients g of the first `outputs` modulations
// are given: adds to the sums, and gives h.
template <class T, int V, int O, bool All, class Law>
SORA_D void backward_columns(const Normed& a, int outputs, const float (&xhat)[V],
                             const float (&g)[O][V], const float (&scales)[O][V], int column,
                             Law law, ModulationSums<V, O, All>* sums, float (&h)[V]) {
  float normed[V], rounded_xhat[V];
#pragma unroll
  for (int i = 0; i < V; ++i) rounded_xhat[i] = xhat[i];
  round_at<T, V>(law, kXhat, rounded_xhat);
#pragma unroll
  for (int i = 0; i < V; ++i) normed[i] = rounded_xhat[i];
  affine<T, V>(a.weight, a.bias, column, law, normed);
#pragma unroll
  for (int o = 0; o < O; ++o) {
    if (o >= outputs) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (sums) {
        sums->dshift[o][i] += g[o][i];
        sums->dscale[o][i] = fmaf(g[o][i], normed[i], sums->dscale[o][i]);
      }
      h[i] = o == 0 ? g[o][i] * scales[o][i] : fmaf(g[o][i], scales[o][i], h[i]);
    }
  }
  if (All && sums) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums->dweight[i] = fmaf(h[i], rounded_xhat[i], sums->dweight[i]);
      sums->dbias[i] += h[i];
    }
  }
  if (a.weight.data) {
    float weight[V];
    load<V>(a.weight, 0, column, weight);
#pragma unroll
    for (int i = 0; i < V; ++i) h[i] *= weight[i];
  }
}

// From the sums of h and h * xhat in this thread to the means over the row (RMS: 0 for that of h).
SORA_D void team_means(const Normed& a, float (&sums)[2], TeamScratch<2>& scratch, int slot) {
  const float inverse = 1.0f / static_cast<float>(a.width);
  team_sum<2>(sums, scratch, slot);
  sums[0] = a.mean ? sums[0] * inverse : 0.0f;
  sums[1] *= inverse;
}

// The gradient of the norm's input.
SORA_D float norm_gradient(float rstd, float h, float xhat, const float (&means)[2]) {
  return rstd * fmaf(-xhat, means[1], h - means[0]);
}

SORA_D float mean_of(const Normed& a, int64_t n) { return a.mean ? a.mean[n] : 0.0f; }

// The row of token n, for a loop over tokens: mostly all of them are one batch.
template <class T>
SORA_D const T* row_at(const Tokens& x, int n) {
  if (n < x.per_batch) return static_cast<const T*>(x.data) + n * x.token_stride;
  return token_row<T>(x, n);
}

// Asks for the token at a position of a block, if there is one: rows(n) for its numbers.
template <int Pieces, class Rows>
SORA_D void ask(Ahead<Pieces>& ahead, const Normed& a, const TokenBlock& block, int position,
                Rows rows) {
  if (position < block.stop) {
    const int n = static_cast<int>(token_at(a.rows, position));
    ahead.ask_statistics(a, n);
    rows(n);
  }
  ahead.end();
}

// visit(position, n, row) for the sorted tokens of a block, and change(before, row) wherever the row
// changes, -1 at either end. A row ends where the next one begins: maps are asked once per row.
template <class Change, class Visit>
SORA_D void walk(const RowMap& rows, const TokenBlock& block, Change change, Visit visit) {
  int row = -1, end = block.start;  // of the row
  for (int position = block.start; position < block.stop; ++position) {
    const int n = static_cast<int>(token_at(rows, position));
    if (position >= end) {
      const int before = row;
      row = static_cast<int>(row_of(rows, n));
      end = static_cast<int>(row_begin(rows, row + 1));
      change(before, row);
    }
    visit(position, n, row);
  }
  change(row, -1);
}

// The means of token n, whose row no team can hold, from columns(c, mean, rstd, xhat, h).
template <class Columns>
SORA_D void write_means(const Normed& a, int64_t n, float* means, Columns columns,
                        TeamScratch<2>& scratch) {
  const float mean = mean_of(a, n), rstd = a.rstd[n];
  float sums[2] = {};
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float xhat[1], h[1];
    columns(c, mean, rstd, xhat, h);
    sums[0] += h[0];
    sums[1] = fmaf(h[0], xhat[0], sums[1]);
  }
  team_means(a, sums, scratch, 0);
  if (threadIdx.x == 0) means[2 * n] = sums[0], means[2 * n + 1] = sums[1];
}

// --- launches ---------------------------------------------------------------------------------------------

// Any width, address and type: first the means of every row, where they are wanted, then everything
// else, which is the columns' own: one thread per column and block of tokens.
template <class Args>
void launch_any(void (*means)(Args), void (*rest)(Args, int), const Args& a, bool wants_means,
                int size, Stream stream) {
  if (wants_means) {
    const dim3 block = row_threads(a.width, kElements, kAnyThreads);
    launch(means, dim3(blocks_of(a.tokens, block.y)), block, 0, stream, a);
  }
  const int threads = a.width < kAnyThreads ? round_up(a.width, kWarp) : kAnyThreads;
  launch(rest, dim3(blocks_of(a.tokens, size), blocks_of(a.width, threads)), dim3(threads), 0,
         stream, a, size);
}

// Whole rows, one block of sorted tokens per team, whose threads ask for Pieces of a token.
template <int Pieces, class Args>
void launch_row(void (*kernel)(Args, int, AheadPlan), const Args& a, int threads, int size,
                Stream stream) {
  const dim3 block = row_threads(a.width, kElements, threads);
  const AheadPlan plan = plan_ahead<Pieces>(block);
  launch(kernel, dim3(blocks_of(a.tokens, size * block.y)), block, plan.bytes, stream, a, size,
         plan);
}

}  // namespace sora::cuda
