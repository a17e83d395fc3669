// Kernels of qk_norm_rope. How a pass is laid over threads is planned in qk_norm_rope_plan.cpp.
//
// A group of lanes (a warp or a part of one) works on one head at a time. `slots` groups share the
// heads of a token, and each reads cos and sin once for all of its heads. A block works on `tile`
// tokens of one side (blockIdx.y: q or k) at a time; one of the backward walks over many tiles. A head
// that a group holds in registers is read once, a longer one once per pass; the statistics of a norm
// across heads go through shared memory.
//
// Gradients of weights: every group sums its tokens in a row of its own in shared memory, a block adds
// those rows in order and writes one row of partial sums, and a second kernel adds these in order.
// Nothing is atomic, and the order is a function of the shapes.
#include <algorithm>

#include "dispatch.h"
#include "qk_norm_rope_head.h"
#include "qk_norm_rope_plan.h"

namespace sora::cuda {
namespace {

// Shared memory of a block: [tile, 4] rows of the tables, [2, groups] sums, gradients of weights.
struct Shared {
  int* rows;
  float* token_sums;
  float* gradients;
};

SORA_D Shared shared_of(const QkSide& s, int groups) {
  int* words = static_cast<int*>(dynamic_shared());
  return {words, reinterpret_cast<float*>(words + 4 * s.tile),
          reinterpret_cast<float*>(words + shared_words(s.tile, groups))};
}

// The rows of cos and sin that a token takes: one, or one for each axis.
SORA_D void table_rows(const QkNormRope& a, const QkSide& s, int64_t n, int* rows) {
  int64_t token = a.index ? a.index[n] : n;
  token -= token_quotient(token, s.rope_tokens) * s.rope_tokens;
  if (!s.position_index) return grid_rows(s.grids, token, rows);
#pragma unroll 1
  for (int axis = 0; axis < a.num_positions; ++axis)
    rows[axis] = s.position_index[token * a.num_positions + axis];
}

// The lanes that work on a head, and what one of them holds of it.
template <class T, int V, bool Back>
struct Group {
  const QkNormRope& a;
  const QkSide& s;
  const Shared shared;
  const int lane, number, slot, local;  // local: token of the tile
  bool here = false;                    // whether there is such a token
  int64_t packed = 0, input = 0, x_at = 0, dy_at = 0;
  int held = -1, step_held = -1, angles_held = -1, weight_held = -1;  // what the registers hold
  Piece<V> piece;
  Words<T, V> x[2];  // the input of a head, as it is stored
  float g[2][V];     // dy turned back
  float weight[2][V], cosine[V], sine[V];

  __device__ Group(const QkNormRope& args, const QkSide& side)
      : a(args),
        s(side),
        shared(shared_of(side, blockDim.x / args.lanes)),
        lane(threadIdx.x % args.lanes),
        number(threadIdx.x / args.lanes),
        slot(number % side.slots),
        local(number / side.slots) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r] = {};
#pragma unroll
      for (int i = 0; i < V; ++i) weight[r][i] = 1.0f;
    }
  }

  // Goes to a tile of tokens.
  __device__ void enter(int64_t tile) {
    const int64_t n = tile * s.tile + local;
    here = local < s.tile && n < s.tokens;
    if (here) {
      packed = a.index ? a.index[n] : n;
      input = a.gather ? packed : n;
      x_at = token_offset(s.x, input);
      if (Back) dy_at = token_offset(s.dy, packed);
    }
    held = angles_held = -1;
    if (!a.rotate) return;
    __syncthreads();  // the rows of the tile before were read
    const int64_t mine = tile * s.tile + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < s.tile && mine < s.tokens)
      table_rows(a, s, mine, shared.rows + 4 * threadIdx.x);
    __syncthreads();
  }

  // Brings piece `step` of a head into registers, with all that belongs to it.
  __device__ void bring(int head, int step) {
    const int wanted = head * a.steps + step;
    if (held == wanted) return;
    held = wanted;
    if (step_held != step) {
      step_held = step;
      angles_held = weight_held = -1;
      piece.place(a, lane, step);
    }
    Words<T, V> dy[2];
    if (!Back || a.norm != kNoNorm)
      piece.fetch(static_cast<const T*>(s.x.data) + x_at + head * s.x.head_stride, x);
    if (Back) piece.fetch(static_cast<const T*>(s.dy.data) + dy_at + head * s.dy.head_stride, dy);
    if (a.steps == 1 && head + s.slots < s.heads) come_closer(head + s.slots);
    const int weight_row = s.weight.stride ? head : 0;
    if (s.weight.data && weight_held != weight_row) {
      weight_held = weight_row;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (piece.here[r]) load<V>(s.weight, weight_row, piece.column[r], weight[r]);
    }
    const int table = a.per_head ? head : 0;
    if (a.rotate && angles_held != table) {
      angles_held = table;
      load_angles(table);
    }
    if constexpr (Back) {
      widen<T, V>(dy[0], g[0]);
      widen<T, V>(dy[1], g[1]);
      turn<T, V, true>(a, piece, cosine, sine, g);
    }
  }

  // Has a head brought from memory to the L2 cache while another one is worked on.
  __device__ void come_closer(int head) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!piece.here[r]) continue;
      const int64_t x_head = x_at + head * s.x.head_stride, dy_head = dy_at + head * s.dy.head_stride;
      if (!Back || a.norm != kNoNorm)
        prefetch(static_cast<const T*>(s.x.data) + x_head + piece.column[r]);
      if (Back) prefetch(static_cast<const T*>(s.dy.data) + dy_head + piece.column[r]);
    }
  }

  __device__ void load_angles(int head) {
    const int* rows = shared.rows + 4 * local;
#pragma unroll
    for (int p = 0; p < V; ++p) {
      const int j = piece.pair_at(p);
      cosine[p] = sine[p] = 0.0f;
      if (j >= a.turned) continue;
      int axis = 0;
#pragma unroll
      for (int i = 0; i + 1 < kMaxAxes; ++i)
        axis += i + 1 < a.num_positions && j >= a.axis_end[i];
      int64_t row = rows[axis];
      if (a.per_head) row = row * s.heads + head;
      cosine[p] = rounded_at(kRope, __ldg(s.cos + row * a.turned + j));
      sine[p] = rounded_at(kRope, __ldg(s.sin + row * a.turned + j));
    }
  }

  __device__ float rounded_at(int points, float v) const {
    if (sizeof(T) == 4) return v;
    return a.law & points ? rounded(v, static_cast<const T*>(nullptr)) : v;
  }
  __device__ float inverse_root(float squares, float inverse) const {
    return 1.0f / sqrtf(squares * inverse + a.eps);
  }
  // The sum over the lanes of the group. All lanes of the warp take part.
  __device__ float sum(float v) const {
#pragma unroll 1
    for (int other = a.lanes / 2; other > 0; other /= 2) v += __shfl_xor_sync(kFullMask, v, other);
    return v;
  }
  // Two sums over all groups of a token. All threads of the block take part.
  __device__ void token_sum(float (&v)[2]) const {
    const int groups = blockDim.x / a.lanes;
    __syncthreads();  // the sums of the tile before were read
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float mine = sum(v[i]);
      if (lane == 0) shared.token_sums[i * groups + number] = mine;
      v[i] = 0.0f;
    }
    __syncthreads();
    if (local >= s.tile) return;
#pragma unroll 1
    for (int other = local * s.slots; other < (local + 1) * s.slots; ++other) {
      v[0] += shared.token_sums[other];
      v[1] += shared.token_sums[groups + other];
    }
  }
};

// Where a group sums the gradients of its weights: `copies` rows lie side by side.
struct WeightGradients {
  float *dweight = nullptr, *dbias = nullptr;  // of the block
  int copies, size;                            // size: columns of a copy
  int mine;                                    // where the group's copy begins

  __device__ WeightGradients(const QkNormRope& a, const QkSide& s, float* memory, int group,
                             int local) {
    const bool full = a.norm == kRmsFull;
    copies = full ? s.tile : blockDim.x / a.lanes;
    size = static_cast<int>(qk_parameters(a, s));
    mine = (full ? local : group) * size;
    if (!s.dweight && !s.dbias) return;
    float* start = s.direct ? s.partial + static_cast<int64_t>(blockIdx.x) * size : memory;
    if (s.dweight) dweight = start;
    if (s.dbias) dbias = start + static_cast<int64_t>(s.direct ? s.blocks : copies) * size;
    for (int i = threadIdx.x; i < copies * size; i += blockDim.x) {
      if (dweight) dweight[i] = 0.0f;
      if (dbias) dbias[i] = 0.0f;
    }
    __syncthreads();
  }

  // The block's row of partial sums.
  __device__ void finish(const QkSide& s) const {
    if (s.direct || (!dweight && !dbias)) return;
    __syncthreads();
#pragma unroll 1
    for (int plane = 0; plane < 2; ++plane) {
      const float* from = plane ? dbias : dweight;
      if (!from) continue;
      float* to = s.partial + (static_cast<int64_t>(plane) * s.blocks + blockIdx.x) * size;
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        float total = 0.0f;
        for (int copy = 0; copy < copies; ++copy) total += from[copy * size + i];
        to[i] = total;
      }
    }
  }
};

// What the statistics of a head leave to its elements: xhat = (x - mean) * rstd, and
// dx = rstd * (g - offset - xhat * slope) of g = dy (turned back) * weight.
struct Stats {
  float mean = 0.0f, rstd = 1.0f, slope = 0.0f, offset = 0.0f;
};

template <class T, int V>
SORA_D void write_head(const Group<T, V, false>& group, const Stats& stats, int head) {
  const QkNormRope& a = group.a;
  const QkSide& s = group.s;
  float v[2][V];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x[V], bias[V] = {};
    widen<T, V>(group.x[r], x);
    if (s.bias.data && group.piece.here[r]) load<V>(s.bias, 0, group.piece.column[r], bias);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float xhat = group.rounded_at(kXhat, (x[i] - stats.mean) * stats.rstd);
      v[r][i] = group.rounded_at(kAffine | kPreRope, xhat * group.weight[r][i] + bias[i]);
    }
  }
  turn<T, V, false>(a, group.piece, group.cosine, group.sine, v);
  T* y = static_cast<T*>(s.y) + (group.packed * s.heads + head) * a.width;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (group.piece.here[r]) store<T, V>(y + group.piece.column[r], v[r]);
}

template <class T, int V>
SORA_D void write_head(const Group<T, V, true>& group, const Stats& stats, int head,
                       const WeightGradients& gradients) {
  const QkNormRope& a = group.a;
  const QkSide& s = group.s;
  float x[2][V], v[2][V];
  widen<T, V>(group.x[0], x[0]);
  widen<T, V>(group.x[1], x[1]);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[r][i] = (x[r][i] - stats.mean) * stats.rstd;
      v[r][i] = group.g[r][i] * group.rounded_at(kXhat, x[r][i]);
    }
  const int column = gradients.mine + (s.weight.stride ? head * a.width : 0);
  if (gradients.dweight) group.piece.add(gradients.dweight + column, v);
  if (gradients.dbias) group.piece.add(gradients.dbias + column, group.g);
  if (!s.dx) return;
  T* dx = static_cast<T*>(s.dx) + (group.input * s.heads + head) * a.width;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float g = group.g[r][i] * group.weight[r][i];
      v[r][i] = stats.rstd * (g - stats.offset - x[r][i] * stats.slope);
    }
    if (group.piece.here[r]) store<T, V>(dx + group.piece.column[r], v[r]);
  }
}

enum Pass : int { kMean, kSums, kWrite };

template <class T, int V, bool Back>
__global__ void __launch_bounds__(kMostThreads, 1) kernel(const __grid_constant__ QkNormRope a) {
  const QkSide& s = a.side[blockIdx.y];
  if (blockIdx.x >= static_cast<unsigned>(s.blocks)) return;
  Group<T, V, Back> group(a, s);
  const bool full = a.norm == kRmsFull;
  const float count = static_cast<float>(qk_parameters(a, s)), inverse = 1.0f / count;
  const WeightGradients gradients(a, s, group.shared.gradients, group.number, group.local);
  for (int64_t tile = blockIdx.x; tile < s.tiles; tile += s.blocks) {
    group.enter(tile);
    Stats stats;
    // A norm across heads goes over all heads for their sums, and once more to write.
#pragma unroll 1
    for (int phase = full ? 0 : 1; phase < 2; ++phase) {
      const int begin = full             ? (phase ? kWrite : kSums)
                        : a.norm == kLayer ? kMean
                        : a.norm == kRms   ? kSums
                                           : kWrite;
      float sums[2] = {};  // of squares, and of products with the gradient
#pragma unroll 1
      for (int first = 0; first < s.heads; first += s.slots) {
        const int head = first + group.slot;
        const int steps = group.here && head < s.heads ? a.steps : 0;
#pragma unroll 1
        for (int pass = begin; pass <= (phase ? kWrite : kSums); ++pass) {
          float total = 0.0f;  // of x, or of the gradient
          if (pass == begin && !full) stats.mean = 0.0f;
          if (!full) sums[0] = sums[1] = 0.0f;
#pragma unroll 1
          for (int step = 0; step < steps; ++step) {
            group.bring(head, step);
            if (pass == kWrite) {
              if constexpr (Back) write_head<T, V>(group, stats, head, gradients);
              else write_head<T, V>(group, stats, head);
              continue;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float x[V];
              widen<T, V>(group.x[r], x);
              if (!group.piece.here[r]) continue;
#pragma unroll
              for (int i = 0; i < V; ++i) {
                x[i] -= stats.mean;
                sums[0] += x[i] * x[i];
                if (!Back || pass == kMean) {
                  total += x[i];
                } else {
                  const float g = group.g[r][i] * group.weight[r][i];
                  total += g;
                  sums[1] += x[i] * g;
                }
              }
            }
          }
          if (full || pass == kWrite) continue;
          total = group.sum(total);
          if (pass == kMean) {
            stats.mean = total / count;
            continue;
          }
          stats.rstd = group.inverse_root(group.sum(sums[0]), inverse);
          if (Back) stats.slope = group.sum(sums[1]) * stats.rstd * inverse;
          if (Back && a.norm == kLayer) stats.offset = total * inverse;
        }
      }
      if (phase == 0) {
        group.token_sum(sums);
        stats.rstd = group.inverse_root(sums[0], inverse);
        stats.slope = sums[1] * stats.rstd * inverse;
      }
    }
  }
  gradients.finish(s);
}

// Adds the partial sums of 32 columns of one gradient: every thread some rows of them, in order, then
// the threads of a column one after the other.
__global__ void __launch_bounds__(kWarp* kWarp) finish_kernel(const __grid_constant__ QkNormRope a) {
  __shared__ double lanes[kWarp][kWarp + 1];
  const QkSide& s = a.side[blockIdx.y / 2];
  const int plane = blockIdx.y % 2, row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* out = plane ? s.dbias : s.dweight;
  const int64_t size = qk_parameters(a, s), column = int64_t{blockIdx.x} * kWarp + lane;
  if (!out || int64_t{blockIdx.x} * kWarp >= size) return;
  double total = 0.0;
  if (column < size)
    for (int block = row; block < s.blocks; block += kWarp)
      total += s.partial[(int64_t{plane} * s.blocks + block) * size + column];
  lanes[row][lane] = total;
  __syncthreads();
  if (row != 0 || column >= size) return;
  for (int other = 1; other < kWarp; ++other) total += lanes[other][lane];
  out[column] = static_cast<float>(total);
}

template <bool Back>
void run(const QkNormRope& a, Stream stream) {
  const dim3 grid(std::max(a.side[0].blocks, a.side[1].blocks), a.side[1].blocks ? 2 : 1);
  by_type(a.type, a.type, [&](auto type, auto) {
    using T = decltype(type);
    launch(a.vectors ? kernel<T, kVector<T>, Back> : kernel<T, 1, Back>, grid, dim3(a.threads),
           a.shared_bytes, stream, a);
  });
}

}  // namespace

void qk_norm_rope_fwd(const QkNormRope& a, Stream stream) { run<false>(a, stream); }

void qk_norm_rope_bwd(const QkNormRope& a, Stream stream) {
  run<true>(a, stream);
  int64_t columns = 0;
  for (const QkSide& s : a.side)
    if (s.dweight || s.dbias) columns = std::max(columns, qk_parameters(a, s));
  launch(finish_kernel, dim3(blocks_of(columns, kWarp), 4), dim3(kWarp * kWarp), 0, stream, a);
}

}  // namespace sora::cuda
