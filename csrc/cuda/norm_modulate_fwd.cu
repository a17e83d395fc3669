// Forward kernels of norm_modulate: a row in the registers of its threads, or any row read three times.
#include "dispatch.h"
#include "norm_forward.h"
#include "norm_modulate.h"

namespace sora::cuda {
namespace {

constexpr int kElements = 16;  // of a row, in the registers of one thread
constexpr int kMaxThreads = 1024, kAnyThreads = 512;

// All outputs of token n at `column`, from the centred row; T is void where the law knows the type.
template <class T, int V, class Law>
SORA_D void write(const NormModulateFwd& a, int64_t n, int64_t row, int column, float rstd, Law law,
                  float (&normed)[V]) {
  normed_columns<T, V>(a, column, rstd, law, normed);
#pragma unroll
  for (int o = 0; o < kMaxOutputs; ++o) {
    if (o >= a.outputs) continue;
    float v[V];
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = normed[i];
    modulate<T, V>(a.scale[o], a.scale_table, a.shift[o], a.shift_table, row, column, law, v);
    if constexpr (sizeof(Law) == sizeof(int))
      store<T, V>(static_cast<T*>(a.y[o]) + n * a.width + column, v);
    else store<V>(a.y[o], a.out_type, n * a.width + column, v);
  }
}

// One row per blockDim.x threads, 16 bytes at a time.
template <class Tin, class Tout>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_modulate_fwd_row(
    const __grid_constant__ NormModulateFwd a) {
  constexpr int V = kVector<Tin, Tout>, K = kElements / V;
  __shared__ TeamScratch<1> scratch;
  const int64_t n = team_number();
  if (n >= a.tokens) return;
  const Tin* x = token_row<Tin>(a.x, n);
  Words<Tin, V> words[K] = {};
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (team_column<V>(k) < a.width) words[k] = fetch<Tin, V>(x + team_column<V>(k));

  float v[K][V];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    widen<Tin, V>(words[k], v[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += v[k][i];
  }
  const float rstd = centre_row(a, n, sum, v, scratch);
  const int64_t row = row_of(a.rows, n);
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (team_column<V>(k) < a.width)
      write<Tout, V>(a, n, row, team_column<V>(k), rstd, a.law, v[k]);
}

// Any width, address and type: the row is read once for each sum and once for the outputs.
__global__ void __launch_bounds__(kAnyThreads, 1) norm_modulate_fwd_any(
    const __grid_constant__ NormModulateFwd a) {
  __shared__ TeamScratch<1> scratch;
  const int64_t n = team_number();
  if (n >= a.tokens) return;
  const auto [mean, rstd] =
      row_statistics(a, n, [&](int c) { return load_one(a.x, n, c); }, scratch);
  const int64_t row = row_of(a.rows, n);
  for (int c = threadIdx.x; c < a.width; c += blockDim.x) {
    float v[1] = {load_one(a.x, n, c) - mean};
    write<void, 1>(a, n, row, c, rstd, TypedLaw{a.law, a.out_type}, v);
  }
}

}  // namespace

void run_forward(const NormModulateFwd& a, Stream stream) {
  const bool vectors =
      a.width <= kElements * kMaxThreads &&
      vectors_fit(a.width, a.x, a.weight, a.bias, a.shift_table, a.scale_table, a.shift[0],
                  a.shift[1], a.scale[0], a.scale[1]);
  const dim3 block = row_threads(a.width, kElements, vectors ? kMaxThreads : kAnyThreads);
  const dim3 grid(blocks_of(a.tokens, block.y));
  if (!vectors) return launch(norm_modulate_fwd_any, grid, block, 0, stream, a);
  by_type(a.x.type, a.out_type, [&](auto in, auto out) {
    launch(norm_modulate_fwd_row<decltype(in), decltype(out)>, grid, block, 0, stream, a);
  });
}

}  // namespace sora::cuda
