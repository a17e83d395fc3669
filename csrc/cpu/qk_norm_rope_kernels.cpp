// Kernels of qk_norm_rope. Compiled once per instruction set; no torch headers.
//
// A token is read once from memory: a first pass over its heads leaves their statistics, the next
// ones find it in L1. Norm, weight and rotation are one loop over a head in registers. Large outputs
// bypass the cache; such stores must fill whole cache lines, and heads of 72 components do not end
// on one, so a token's heads are collected in a scratch row first.
#include "qk_norm_rope.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "grouped_sum.h"
#include "modulation.h"
#include "qk_norm_rope_fast.h"
#include "scratch.h"

namespace sora::SORA_ISA {
namespace {


template <class T>
const T* head_row(const Heads& x, int64_t n, int64_t h) {
  return token_of<T>(x, n) + h * x.head_stride;
}

inline Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// cos and sin of one token, in the layout that the rotation reads.
//   interleaved  per component: cos twice, and (-sin, sin), so that y = u * cos + swap(u) * sin
//   half(s)      per pair, in table order
template <class T, bool Law>
class Angles {
 public:
  Angles(const QkNormRope& args, Scratch& scratch)
      : a(args),
        cos_(scratch.row()),
        sin_(scratch.row()),
        rows_{{args, args.side[0]}, {args, args.side[1]}} {}

  // n: a token of the pass; head only matters to tables per head.
  void load(const QkSide& side, int64_t n, int64_t head = 0) {
    const int32_t* position = rows_[&side - a.side].of(n);
    const int64_t half = a.axis_end[a.axes - 1];
    const Round<T, Law> round{a.law};
    for (int64_t axis = 0, j = 0; axis < a.num_positions; ++axis) {
      const int64_t end = a.num_positions == 1 ? half : a.axis_end[axis];
      int64_t row = position[axis];
      if (a.per_head) row = row * side.heads + head;
      const float* c = side.cos + row * half;
      const float* s = side.sin + row * half;
      if (loaded_[axis][0] == c && loaded_[axis][1] == s) {
        j = end;
        continue;
      }
      loaded_[axis][0] = c;
      loaded_[axis][1] = s;
      if (a.pairing == kInterleaved) {
        for (int64_t i = j; i < end; ++i) {
          cos_[2 * i] = cos_[2 * i + 1] = c[i];
          sin_[2 * i] = -s[i];
          sin_[2 * i + 1] = s[i];
        }
      } else {
        std::memcpy(cos_ + j, c + j, (end - j) * sizeof(float));
        std::memcpy(sin_ + j, s + j, (end - j) * sizeof(float));
      }
      j = end;
    }
    if (Law && a.law & kRope) {
      const int64_t n = a.pairing == kInterleaved ? 2 * half : half;
      for (float* table : {cos_, sin_})
        for_row(n, [&](int64_t d, auto io) { io.put(table + d, round(io.get(table + d), kRope)); });
    }
  }

  // put(d, io, y) for all components of a head, y = rotation (by the negative angle if Back) of
  // what get(d, io) returns.
  template <bool Back, class Get, class Put>
  void rotate(Get&& get, Put&& put) const {
    const int64_t turned = a.rotate ? 2 * a.axis_end[a.axes - 1] : 0;
    if (a.pairing == kInterleaved) {
      const Round<T, Law && !Back> round{a.law};
      for_row(turned, [&](int64_t d, auto io) {
        const Vec u = get(d, io);
        const Vec kept = round(u * io.get(cos_ + d), kRope);
        const Vec crossed = round(swap_neighbours(u) * io.get(sin_ + d), kRope);
        put(d, io, Back ? kept - crossed : kept + crossed);
      });
    } else if (a.pairing == kHalf) {
      rotate_halves<Back>(0, turned / 2, get, put);
    } else if (turned) {
      for (int64_t axis = 0, j = 0; axis < a.axes; j = a.axis_end[axis++])
        rotate_halves<Back>(j, a.axis_end[axis], get, put);
    }
    for_row(a.width - turned,
            [&](int64_t d, auto io) { put(turned + d, io, get(turned + d, io)); });
  }

 private:
  const QkNormRope& a;
  float *cos_, *sin_;
  TableRows rows_[2];
  const float* loaded_[kMaxAxes][2] = {};  // rows of cos and sin that cos_ and sin_ hold

  // Pairs [begin, end) whose components are the two halves of [2 * begin, 2 * end).
  template <bool Back, class Get, class Put>
  void rotate_halves(int64_t begin, int64_t end, Get&& get, Put&& put) const {
    const Round<T, Law && !Back> round{a.law};
    const int64_t first = 2 * begin, second = begin + end;
    for_row(end - begin, [&](int64_t j, auto io) {
      const Vec x = get(first + j, io), y = get(second + j, io);
      const Vec c = io.get(cos_ + begin + j);
      Vec s = io.get(sin_ + begin + j);
      if (Back) s = -s;
      put(first + j, io, round(x * c, kRope) - round(y * s, kRope));
      put(second + j, io, round(y * c, kRope) + round(x * s, kRope));
    });
  }
};

// mean and 1 / sqrt(mean square (variance) + eps) of every head; all the same for kRmsFull.
struct Stats {
  float *mean, *rstd;  // [heads]
};

template <class T>
void statistics(const QkNormRope& a, const QkSide& side, int64_t n, Stats stats) {
  if (a.norm == kNoNorm) return;
  const int64_t heads = side.heads;
  for (int64_t h = 0; h < heads; ++h) {
    const T* x = head_row<T>(side.x, input_row(a, n), h);
    if (a.norm == kLayer) {
      const float mean = sum_row(a.width, [&](int64_t d, auto io) { return io.get(x + d); }) /
                         static_cast<float>(a.width);
      stats.mean[h] = mean;
      stats.rstd[h] = sum_row(a.width, [&](int64_t d, auto io) {
        const Vec v = io.get(x + d) - splat(mean);
        return v * v;
      });
    } else {
      stats.rstd[h] = sum_row(a.width, [&](int64_t d, auto io) {
        const Vec v = io.get(x + d);
        return v * v;
      });
    }
  }
  int64_t count = a.width;
  if (a.norm == kRmsFull) {
    for (int64_t h = 1; h < heads; ++h) stats.rstd[0] += stats.rstd[h];
    for (int64_t h = 1; h < heads; ++h) stats.rstd[h] = stats.rstd[0];
    count *= heads;
  }
  const Vec inverse = splat(1.0f / static_cast<float>(count)), one = splat(1.0f);
  for_row(heads, [&](int64_t h, auto io) {
    io.put(stats.rstd + h, one / square_root(io.get(stats.rstd + h) * inverse + splat(a.eps)));
  });
}

// What one thread works with.
template <class T, bool Law>
struct Workspace {
  explicit Workspace(const QkNormRope& a, int rows)
      : most(a.side[0].heads > a.side[1].heads ? a.side[0].heads : a.side[1].heads),
        wide(a.width * most, rows + 1),
        small(a.width > most ? a.width : most, 6),
        out(reinterpret_cast<T*>(wide.row())),
        angles(a, small),
        stats{small.row(), small.row()},
        mean_g(small.row()),
        mean_gx(small.row()) {
    std::memset(stats.mean, 0, most * sizeof(float));
    for (int64_t h = 0; h < most; ++h) stats.rstd[h] = 1.0f;
  }
  int64_t most;
  Scratch wide, small;
  T* out;  // one token of results
  Angles<T, Law> angles;
  Stats stats;
  float *mean_g, *mean_gx;  // [heads], sums of the backward
};

inline const float* head_weight(const QkNormRope& a, const QkSide& side, int64_t h) {
  return side.weight && a.norm == kRmsFull ? side.weight + h * a.width : side.weight;
}

template <class T, bool Law>
void forward(const QkNormRope& a, int64_t begin, int64_t end) {
  Workspace<T, Law> w(a, 0);
  const Round<T, Law> round{a.law};
  for (int64_t n = begin; n < end; ++n) {
    bool loaded = a.per_head || !a.rotate;
    for (const QkSide& side : a.side) {
      if (n >= side.tokens) continue;
      if (!loaded) w.angles.load(side, n);
      loaded = loaded || a.same_tables;
      const int64_t size = side.heads * a.width;
      T* y = static_cast<T*>(side.y) + packed_row(a, n) * size;
      statistics<T>(a, side, n, w.stats);
      for (int64_t h = 0; h < side.heads; ++h) {
        if (a.per_head) w.angles.load(side, n, h);
        const T* x = head_row<T>(side.x, input_row(a, n), h);
        T* out = (a.stream ? w.out : y) + h * a.width;
        const auto put = [&](int64_t d, auto io, Vec v) { io.put(out + d, v); };
        if (a.norm == kNoNorm) {
          w.angles.template rotate<false>([&](int64_t d, auto io) { return io.get(x + d); }, put);
          continue;
        }
        const Vec mean = splat(w.stats.mean[h]), rstd = splat(w.stats.rstd[h]);
        const float* weight = head_weight(a, side, h);
        const float* bias = side.bias;
        w.angles.template rotate<false>(
            [&](int64_t d, auto io) {
              Vec v = round((io.get(x + d) - mean) * rstd, kXhat);
              if (weight) v = v * io.get(weight + d);
              if (bias) v = v + io.get(bias + d);
              return round(v, kAffine | kPreRope);
            },
            put);
      }
      if (a.stream) copy_past_cache(y, w.out, size);
    }
  }
  if (a.stream) stream_fence();
}

// partial[block] = sum of a block over its groups. Each group was summed on its own over the
// tokens: short chains of additions keep the error of a long sum small.
inline void keep_sum(const float* sums, int64_t groups, int64_t count, float* partial,
                     int64_t block) {
  if (!partial) return;
  float* out = partial + block * count;
  for_row(count, [&](int64_t d, auto io) {
    Vec total = io.get(sums + d);
    for (int64_t i = 1; i < groups; ++i) total = total + io.get(sums + i * count + d);
    io.put(out + d, total);
  });
}

// One token of one side. dweight and dbias are sums per head [H * D], or null.
template <class T, bool Law>
void token_backward(const QkNormRope& a, const QkSide& side, int64_t n, Workspace<T, Law>& w,
                    float* g_row, float* dweight_row, float* dbias_row) {
  const Round<T, Law> round{a.law};
  const int64_t width = a.width;
  const int64_t row = input_row(a, n);
  T* dx = static_cast<T*>(side.dx) + row * side.heads * width;
  T* out_row = a.stream ? w.out : dx;
  statistics<T>(a, side, n, w.stats);
  float total_first = 0.0f, total_second = 0.0f;
  for (int64_t h = 0; h < side.heads; ++h) {
    if (a.per_head) w.angles.load(side, n, h);
    const T* dy = head_row<T>(side.dy, packed_row(a, n), h);
    const auto get = [&](int64_t d, auto io) { return io.get(dy + d); };
    if (a.norm == kNoNorm) {
      T* out = out_row + h * width;
      w.angles.template rotate<true>(get, [&](int64_t d, auto io, Vec v) { io.put(out + d, v); });
      continue;
    }
    const T* x = head_row<T>(side.x, row, h);
    const Vec mean = splat(w.stats.mean[h]), rstd = splat(w.stats.rstd[h]);
    const float* weight = head_weight(a, side, h);
    float* g_head = g_row + h * width;
    float* dweight = dweight_row ? dweight_row + h * width : nullptr;
    float* dbias = dbias_row ? dbias_row + h * width : nullptr;
    Vec first{}, second{};
    w.angles.template rotate<true>(get, [&](int64_t d, auto io, Vec g) {
      const Vec xhat = (io.get(x + d) - mean) * rstd;
      if (dweight) io.put(dweight + d, io.get(dweight + d) + g * round(xhat, kXhat));
      if (dbias) io.put(dbias + d, io.get(dbias + d) + g);
      if (weight) g = g * io.get(weight + d);
      io.put(g_head + d, g);
      first = first + g;  // g is 0 in the lanes past a tail
      second = second + g * xhat;
    });
    total_first += w.mean_g[h] = sum(first);
    total_second += w.mean_gx[h] = sum(second);
  }
  if (!side.dx) return;
  for (int64_t h = 0; a.norm != kNoNorm && h < side.heads; ++h) {
    const bool full = a.norm == kRmsFull;
    const float inverse = 1.0f / static_cast<float>(full ? width * side.heads : width);
    const Vec slope = splat((full ? total_second : w.mean_gx[h]) * inverse);
    const Vec offset = splat(a.norm == kLayer ? w.mean_g[h] * inverse : 0.0f);
    const Vec mean = splat(w.stats.mean[h]), rstd = splat(w.stats.rstd[h]);
    const T* x = head_row<T>(side.x, row, h);
    const float* g = g_row + h * width;
    T* out = out_row + h * width;
    for_row(width, [&](int64_t d, auto io) {
      const Vec xhat = (io.get(x + d) - mean) * rstd;
      io.put(out + d, rstd * (io.get(g + d) - offset - xhat * slope));
    });
  }
  if (a.stream) copy_past_cache(dx, w.out, side.heads * width);
}

// Blocks [begin, end) of kBlockTokens tokens each.
template <class T, bool Law>
void backward(const QkNormRope& a, int64_t begin, int64_t end) {
  Workspace<T, Law> w(a, 5);
  const bool full = a.norm == kRmsFull;
  float* g_row = w.wide.row();
  float* sums[2][2] = {{w.wide.row(), w.wide.row()}, {w.wide.row(), w.wide.row()}};
  for (int64_t block = begin; block < end; ++block) {
    for (auto& side : sums)
      for (float* sum : side) std::memset(sum, 0, a.width * w.most * sizeof(float));
    for (int64_t n = block * kBlockTokens; n < (block + 1) * kBlockTokens; ++n) {
      bool loaded = a.per_head || !a.rotate;
      for (int s = 0; s < 2; ++s) {
        const QkSide& side = a.side[s];
        if (!side.wanted || n >= side.tokens) continue;
        if (!loaded) w.angles.load(side, n);
        loaded = loaded || a.same_tables;
        token_backward<T, Law>(a, side, n, w, g_row, side.dweight_partial ? sums[s][0] : nullptr,
                               side.dbias_partial ? sums[s][1] : nullptr);
      }
    }
    for (int s = 0; s < 2; ++s) {
      const QkSide& side = a.side[s];
      if (block * kBlockTokens >= side.tokens) continue;
      const int64_t groups = full ? 1 : side.heads, count = full ? side.heads * a.width : a.width;
      keep_sum(sums[s][0], groups, count, side.dweight_partial, block);
      keep_sum(sums[s][1], groups, count, side.dbias_partial, block);
    }
  }
  if (a.stream) stream_fence();
}

template <class Run>
void by_type(const QkNormRope& a, Run run) {
  auto by_law = [&](auto type) {
    if (a.law & (kXhat | kAffine | kPreRope | kRope)) run(type, true_type{});
    else run(type, false_type{});
  };
  if (a.type == DType::f32) run(float{}, false_type{});  // rounding to fp32 is the identity
  else if (a.type == DType::bf16) by_law(bf16{});
  else by_law(f16{});
}

}  // namespace

void qk_norm_rope_fwd(const QkNormRope& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto type, auto law) {
    using T = decltype(type);
    constexpr bool kLaw = decltype(law)::value;
    if constexpr (!kLaw && !std::is_same_v<T, f16>)
      if (run_fast<T>(a, [&](auto& heads) { heads.forward(begin, end); })) return;
    forward<T, kLaw>(a, begin, end);
  });
}

void qk_norm_rope_bwd(const QkNormRope& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto type, auto law) {
    using T = decltype(type);
    constexpr bool kLaw = decltype(law)::value;
    if constexpr (!kLaw && !std::is_same_v<T, f16>)
      if (run_fast<T>(a, [&](auto& heads) { heads.backward(begin, end); })) return;
    backward<T, kLaw>(a, begin, end);
  });
}

// Units [begin, end): chunks of kColumns columns of q's and then of k's weight and bias.
void qk_norm_rope_bwd_finish(const QkNormRope& a, int64_t begin, int64_t end) {
  int64_t unit = 0;
  for (const QkSide& side : a.side) {
    const int64_t size = a.width * (a.norm == kRmsFull ? side.heads : 1);
    const int64_t blocks = (side.tokens + kBlockTokens - 1) / kBlockTokens;
    for (int64_t column = 0; column < size; column += kColumns, ++unit) {
      if (unit < begin || unit >= end) continue;
      const int64_t n = column + kColumns < size ? kColumns : size - column;
      if (side.dweight) finish_columns(side.dweight_partial, blocks, size, column, n, side.dweight);
      if (side.dbias) finish_columns(side.dbias_partial, blocks, size, column, n, side.dbias);
    }
  }
}

}  // namespace sora::SORA_ISA
