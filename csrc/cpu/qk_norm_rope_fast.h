// The common case of qk_norm_rope, a head at a time in registers: one rounding at the end
// (fp32_once), the width of a real model known at compile time, the whole head rotated with partners
// in the same or in a whole other register. Everything else takes the general loops.
//
// The weight of the norm is folded into the cosines and sines of a token, which all its heads share:
//   y = rstd * (x * (w cos) + partner(x) * (partner(w) sin))
#pragma once
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "qk_norm_rope.h"
#include "scratch.h"
#include "vec.h"

namespace sora::SORA_ISA {

template <class T>
inline const T* token_of(const Heads& x, int64_t n) {
  return static_cast<const T*>(x.data) + token_offset(x, n);
}

// Which rows of cos and sin the tokens of a side take: one, or one for each axis.
class TableRows {
 public:
  TableRows(const QkNormRope& args, const QkSide& side) : a(args), s(side), walk_(side.grids) {}

  const int32_t* of(int64_t n) {  // n: a token of the pass
    int64_t token = packed_row(a, n);
    if (token >= s.rope_tokens) token %= s.rope_tokens;
    return s.position_index ? s.position_index + token * a.num_positions : walk_.rows(token);
  }

 private:
  const QkNormRope& a;
  const QkSide& s;
  GridWalk walk_;
};

inline Vec swap_neighbours(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(__AVX2__)
  return (Vec)_mm256_permute_ps((__m256)v, 0xb1);
#else
  return Vec{v[1], v[0], v[3], v[2]};
#endif
}

inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <int Registers, bool Half>
struct Head {
  Vec v[Registers];

  template <class T>
  void load(const T* p, int64_t width) {
    for (int i = 0; i + 1 < Registers; ++i) v[i] = SORA_ISA::load(p + i * kLanes);
    const int64_t last = (Registers - 1) * kLanes;
    v[Registers - 1] = width - last == kLanes ? SORA_ISA::load(p + last)
                                              : load_tail(p + last, width - last);
  }
  // Writes whole registers: up to kLanes - 1 zeros follow the head.
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < Registers; ++i) SORA_ISA::store(p + i * kLanes, v[i]);
  }
  Vec partner(int i) const {
    if constexpr (Half) return v[(i + Registers / 2) % Registers];
    else return swap_neighbours(v[i]);
  }
  float total() const {
    Vec s = v[0];
    for (int i = 1; i < Registers; ++i) s = s + v[i];
    return sum(s);
  }
  // The sum of this * other.
  Vec dot(const Head& other, Vec start = Vec{}) const {
    Vec s0 = start, s1{};
    for (int i = 0; i < Registers; i += 2) {
      s0 = multiply_add(v[i], other.v[i], s0);
      if (i + 1 < Registers) s1 = multiply_add(v[i + 1], other.v[i + 1], s1);
    }
    return s0 + s1;
  }
  // Subtracts the mean; lanes past the end stay 0.
  void centre(int64_t width) {
    const Vec mean = splat(total() / static_cast<float>(width));
    for (int i = 0; i < Registers; ++i) v[i] = v[i] - mean;
    v[Registers - 1] = first_lanes(v[Registers - 1], width - (Registers - 1) * kLanes);
  }
};

template <class T, int Registers, bool Half>
class FastHeads {
  using H = Head<Registers, Half>;

 public:
  explicit FastHeads(const QkNormRope& args)
      : a(args),
        wide_(a.width * most(a) + kLanes, 5),
        out_(reinterpret_cast<T*>(wide_.row())),
        rows_{{args, args.side[0]}, {args, args.side[1]}} {
    for (auto& side : sums_)
      for (float*& row : side) row = wide_.row();
  }

  void forward(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (a.rotate && a.same_tables) load_angles(a.side[0], n);
      for (const QkSide& side : a.side) {
        if (n >= side.tokens) continue;
        if (a.rotate && !a.same_tables) load_angles(side, n);
        forward_token(side, n);
      }
    }
    if (a.stream) stream_fence();
  }

  // Blocks of kBlockTokens tokens each.
  void backward(int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int s = 0; s < 2; ++s)
        for (float* row : sums_[s]) std::memset(row, 0, size(a.side[s]) * sizeof(float));
      for (int64_t n = block * kBlockTokens; n < (block + 1) * kBlockTokens; ++n) {
        bool loaded = !a.rotate;
        for (int s = 0; s < 2; ++s) {
          const QkSide& side = a.side[s];
          if (!side.wanted || n >= side.tokens) continue;
          if (!loaded) load_angles(side, n);
          loaded = !a.rotate || a.same_tables;
          backward_token(side, n, sums_[s]);
        }
      }
      for (int s = 0; s < 2; ++s) {
        const QkSide& side = a.side[s];
        if (block * kBlockTokens >= side.tokens) continue;
        const int64_t count = a.norm == kRmsFull ? size(side) : a.width;
        for (auto [partial, row] : {Kept{side.dweight_partial, sums_[s][0]},
                                    Kept{side.dbias_partial, sums_[s][1]}})
          if (partial) std::memcpy(partial + block * count, row, count * sizeof(float));
      }
    }
    if (a.stream) stream_fence();
  }

 private:
  struct Kept {
    float* partial;
    const float* row;
  };

  const QkNormRope& a;
  Scratch wide_;
  T* out_;           // one token of results
  float* sums_[2][2];  // dweight, dbias of one block, of q and of k
  TableRows rows_[2];
  const float* loaded_[kMaxAxes][2] = {};  // rows of cos and sin that cos_ and sin_ hold
  alignas(64) float cos_[Registers * kLanes] = {};
  alignas(64) float sin_[Registers * kLanes] = {};  // -sin at component a of a pair, sin at b

  static int64_t most(const QkNormRope& a) {
    return a.side[0].heads > a.side[1].heads ? a.side[0].heads : a.side[1].heads;
  }
  int64_t size(const QkSide& side) const { return side.heads * a.width; }

  void load_angles(const QkSide& side, int64_t n) {
    const int32_t* position = rows_[&side - a.side].of(n);
    const int64_t half = a.width / 2;
    for (int64_t axis = 0, j = 0; axis < a.num_positions; ++axis) {
      const int64_t end = a.num_positions == 1 ? half : a.axis_end[axis];
      const float* c = side.cos + position[axis] * half;
      const float* s = side.sin + position[axis] * half;
      if (loaded_[axis][0] == c && loaded_[axis][1] == s) {  // neighbours share most of their axes
        j = end;
        continue;
      }
      loaded_[axis][0] = c;
      loaded_[axis][1] = s;
      for (; j < end; ++j) {
        const int64_t first = Half ? j : 2 * j, second = Half ? j + half : 2 * j + 1;
        cos_[first] = cos_[second] = c[j];
        sin_[first] = -s[j];
        sin_[second] = s[j];
      }
    }
  }

  void write(T* to, int64_t n) {
    if (a.stream) copy_past_cache(to, out_, n);
    else std::memcpy(to, out_, n * sizeof(T));
  }

  float inverse_root(float square_sum, float count) const {
    return 1.0f / std::sqrt(square_sum / count + a.eps);
  }

  void forward_token(const QkSide& side, int64_t n) {
    const bool full = a.norm == kRmsFull, turned = a.rotate;
    const float count = static_cast<float>(a.width);
    const T* token = token_of<T>(side.x, input_row(a, n));
    H c, s, bias{}, x, y;
    tables(side, full, c, s, bias);
    Vec scale = splat(1.0f);
    if (full) {
      Vec squares{};
      for (int64_t h = 0; h < side.heads; ++h) {
        x.load(token + h * side.x.head_stride, a.width);
        squares = x.dot(x, squares);
      }
      scale = splat(inverse_root(sum(squares), count * static_cast<float>(side.heads)));
    }
    for (int64_t h = 0; h < side.heads; ++h) {
      x.load(token + h * side.x.head_stride, a.width);
      if (a.norm == kLayer) x.centre(a.width);
      if (a.norm == kRms || a.norm == kLayer) scale = splat(inverse_root(sum(x.dot(x)), count));
      if (full && side.weight) {
        H weight;
        weight.load(side.weight + h * a.width, a.width);
        for (int i = 0; i < Registers; ++i) x.v[i] = x.v[i] * weight.v[i];
      }
      for (int i = 0; i < Registers; ++i) {
        Vec v = x.v[i] * c.v[i];
        if (turned) v = multiply_add(x.partner(i), s.v[i], v);
        y.v[i] = v * scale;
      }
      if (side.bias)
        for (int i = 0; i < Registers; ++i) y.v[i] = y.v[i] + bias.v[i];
      y.store(out_ + h * a.width);
    }
    write(static_cast<T*>(side.y) + packed_row(a, n) * size(side), size(side));
  }

  // cos, sin and the rotated bias of one token, the weight of the norm folded in unless it differs
  // per head.
  void tables(const QkSide& side, bool full, H& c, H& s, H& bias) const {
    H weight;
    for (Vec& v : weight.v) v = splat(1.0f);
    if (side.weight && !full) weight.load(side.weight, a.width);
    if (side.bias) bias.load(side.bias, a.width);
    const H plain = bias;
    for (int i = 0; i < Registers; ++i) {
      const Vec cosine = a.rotate ? load(cos_ + i * kLanes) : splat(1.0f);
      const Vec sine = a.rotate ? load(sin_ + i * kLanes) : Vec{};
      c.v[i] = cosine * weight.v[i];
      s.v[i] = sine * weight.partner(i);
      bias.v[i] = plain.v[i] * cosine + plain.partner(i) * sine;
    }
  }

  // d(output of the affine part) of one head: the gradient turned back.
  void turn_back(const T* dy, const H& c, const H& s, H& du) const {
    if (!a.rotate) return du.load(dy, a.width);
    H in;
    in.load(dy, a.width);
    for (int i = 0; i < Registers; ++i)
      du.v[i] = multiply_add(in.v[i], c.v[i], in.partner(i) * s.v[i]);
  }

  void backward_token(const QkSide& side, int64_t n, float* const sums[2]) {
    const bool full = a.norm == kRmsFull, layer = a.norm == kLayer;
    const bool bias = side.dbias_partial, weighted = side.dweight_partial;
    const float count = static_cast<float>(a.width * (full ? side.heads : 1));
    const int64_t row = input_row(a, n);
    const T* xs = token_of<T>(side.x, row);
    const T* dys = token_of<T>(side.dy, packed_row(a, n));
    H c, s, weight, x, du, g, dweight{}, dbias{};
    for (int i = 0; i < Registers && a.rotate; ++i) {
      c.v[i] = load(cos_ + i * kLanes);
      s.v[i] = -load(sin_ + i * kLanes);
    }
    for (Vec& v : weight.v) v = splat(1.0f);
    if (side.weight && !full) weight.load(side.weight, a.width);
    Vec squares{}, slopes{};
    for (int64_t h = 0; full && h < side.heads; ++h) {
      x.load(xs + h * side.x.head_stride, a.width);
      turn_back(dys + h * side.dy.head_stride, c, s, du);
      if (side.weight) weight.load(side.weight + h * a.width, a.width);
      for (int i = 0; i < Registers; ++i) g.v[i] = du.v[i] * weight.v[i];
      squares = x.dot(x, squares);
      slopes = x.dot(g, slopes);
    }
    float rstd = full ? inverse_root(sum(squares), count) : 1.0f;
    float slope = full ? sum(slopes) * rstd * rstd * rstd / count : 0.0f, offset = 0.0f;
    for (int64_t h = 0; h < side.heads; ++h) {
      turn_back(dys + h * side.dy.head_stride, c, s, du);
      if (a.norm != kNoNorm) {
        x.load(xs + h * side.x.head_stride, a.width);
        if (layer) x.centre(a.width);
        if (full && side.weight) weight.load(side.weight + h * a.width, a.width);
        for (int i = 0; i < Registers; ++i) g.v[i] = du.v[i] * weight.v[i];
        if (!full) {
          rstd = inverse_root(sum(x.dot(x)), count);
          slope = sum(x.dot(g)) * rstd * rstd * rstd / count;
          if (layer) offset = g.total() * rstd / count;
        }
        if (weighted)
          for (int i = 0; i < Registers; ++i)
            dweight.v[i] = multiply_add(du.v[i], x.v[i] * splat(rstd), dweight.v[i]);
        if (bias)
          for (int i = 0; i < Registers; ++i) dbias.v[i] = dbias.v[i] + du.v[i];
        if (full && weighted) {
          add(dweight, sums[0] + h * a.width);
          dweight = H{};
        }
        for (int i = 0; i < Registers; ++i)
          du.v[i] = g.v[i] * splat(rstd) - splat(offset) - x.v[i] * splat(slope);
      }
      if (side.dx) du.store(out_ + h * a.width);
    }
    if (weighted && !full) add(dweight, sums[0]);
    if (bias) add(dbias, sums[1]);
    if (side.dx) write(static_cast<T*>(side.dx) + row * size(side), size(side));
  }

  void add(const H& head, float* to) const {
    for_row(a.width, [&](int64_t d, auto io) {
      io.put(to + d, io.get(to + d) + head.v[d / kLanes]);
    });
  }
};

template <class T, int Width, bool Half, class Run>
inline bool run_width(const QkNormRope& a, Run&& run) {
  if constexpr (Half && Width % (2 * kLanes) != 0) {
    return false;
  } else {
    FastHeads<T, (Width + kLanes - 1) / kLanes, Half> heads(a);
    run(heads);
    return true;
  }
}

template <class T, bool Half, class Run>
inline bool run_pairing(const QkNormRope& a, Run&& run) {
  switch (a.width) {
    case 64: return run_width<T, 64, Half>(a, run);
    case 72: return run_width<T, 72, Half>(a, run);
    case 128: return run_width<T, 128, Half>(a, run);
    default: return false;
  }
}

// Calls run(FastHeads) and returns true if the call is one of the common cases.
template <class T, class Run>
inline bool run_fast(const QkNormRope& a, Run&& run) {
  if (a.per_head || (a.rotate && 2 * a.axis_end[a.axes - 1] != a.width)) return false;
  if (a.pairing == kInterleaved || !a.rotate) return run_pairing<T, false>(a, run);
  if (a.pairing == kHalf) return run_pairing<T, true>(a, run);
  return false;
}

}  // namespace sora::SORA_ISA
