// RMS kernels of norm_silu: statistics per position. No torch headers.
#include "norm_silu_rows.h"

namespace sora::SORA_ISA {
namespace {

inline Vec rstd_of(const NormSilu& a, Vec mean_square) {
  float v[kLanes];
  store(v, mean_square + splat(a.eps));
  for (float& s : v) {
    const float root = std::sqrt(s);
    s = 1.0f / (root < a.floor ? a.floor : root);
  }
  return load(v);
}

// Calls body(l, Rows<n>) for positions [begin, end), kRows at a time and then one by one. What a
// position yields does not depend on its neighbours.
template <int64_t N>
struct Rows {
  static constexpr int64_t count = N;
};
template <class Body>
inline void for_rows(int64_t begin, int64_t end, Body&& body) {
  int64_t l = begin;
  for (; l + kRows <= end; l += kRows) body(l, Rows<kRows>{});
  for (; l < end; ++l) body(l, Rows<1>{});
}

// --- channels last ----------------------------------------------------------------------------------

template <class T, bool kSilu>
void fwd_last(const NormSiluFwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 2);
  float *weight = scratch.row(), *bias = scratch.row();
  arrange<T>(weight, a.weight, a.width);
  arrange<T>(bias, a.bias, a.width);
  const Vec inverse = splat(1.0f / static_cast<float>(a.width));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const int64_t x_step = a.x.stride[2], y_step = a.out.stride[2], width = a.width;
    const T* x = region_of<const T>(a, a.x, b.region);
    T* y = region_of<T>(a, a.out, b.region);
    float* saved = a.rstd + b.region * a.length;
    for (int64_t start = b.begin; start < b.end; start += kLanes) {
      const int64_t stop = start + kLanes < b.end ? start + kLanes : b.end;
      float rstd[kLanes] = {};
      for_rows(start, stop, [&](int64_t l, auto rows) {
        constexpr int64_t n = decltype(rows)::count;
        Pair square[n] = {};
        for_pairs(width, [&](int64_t d, auto io) {
          for (int64_t k = 0; k < n; ++k) {
            const Pair v = io.get(x + (l + k) * x_step + d);
            square[k] = mul_add(v, v, square[k]);
          }
        });
        for (int64_t k = 0; k < n; ++k) rstd[l + k - start] = sum(square[k].a + square[k].b);
      });
      store(rstd, rstd_of(a, load(rstd) * inverse));
      for (int64_t l = start; l < stop; ++l) {
        const T* row = x + l * x_step;
        const Pair scale = both(splat(rstd[l - start]));
        saved[l] = rstd[l - start];
        write_pairs(y + l * y_step, width, a.stream, [&](int64_t d, auto io) {
          const Pair xhat = io.get(row + d) * scale;
          return activate<kSilu>(mul_add(xhat, load_pair(weight + d), load_pair(bias + d)));
        });
      }
    }
  }
}

// With h = du * weight: dx = rstd * (h - xhat * mean(h * xhat)); where the floor held, rstd * h.
template <class T, bool kSilu>
void bwd_last(const NormSiluBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 6 + kRows);
  float *weight = scratch.row(), *bias = scratch.row();
  arrange<T>(weight, a.weight, a.width);
  arrange<T>(bias, a.bias, a.width);
  float* h[kRows];
  for (float*& row : h) row = scratch.row();
  BlockSum du_sum(scratch, a.width), duxhat_sum(scratch, a.width);
  const float inverse = 1.0f / static_cast<float>(a.width), ceiling = 1.0f / a.floor;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const int64_t x_step = a.x.stride[2], dy_step = a.dy.stride[2], width = a.width;
    const T* x = region_of<const T>(a, a.x, b.region);
    const T* dy = region_of<const T>(a, a.dy, b.region);
    const float* saved = a.rstd + b.region * a.length;
    du_sum.clear();
    duxhat_sum.clear();
    for_rows(b.begin, b.end, [&](int64_t l, auto rows) {
      constexpr int64_t n = decltype(rows)::count;
      Vec dot[n] = {}, rstd[n];
      for (int64_t k = 0; k < n; ++k) rstd[k] = splat(saved[l + k]);
      for_pairs(width, [&](int64_t d, auto io) {
        const Pair w = load_pair(weight + d), shift = load_pair(bias + d);
        Pair du_part = load_pair(du_sum.part + d), duxhat_part = load_pair(duxhat_sum.part + d);
        for (int64_t k = 0; k < n; ++k) {
          const Pair xhat = io.get(x + (l + k) * x_step + d) * both(rstd[k]);
          const Pair du = slope<kSilu>(mul_add(xhat, w, shift), io.get(dy + (l + k) * dy_step + d));
          const Pair scaled = du * w;
          du_part = du_part + du;
          duxhat_part = mul_add(du, xhat, duxhat_part);
          store_pair(h[k] + d, scaled);
          dot[k] = mul_add(scaled.b, xhat.b, mul_add(scaled.a, xhat.a, dot[k]));
        }
        store_pair(du_sum.part + d, du_part);
        store_pair(duxhat_sum.part + d, duxhat_part);
      });
      if ((l + n) % kFold == 0 || l + n == b.end) {
        du_sum.fold();
        duxhat_sum.fold();
      }
      if (!a.out.data) return;
      T* dx = region_of<T>(a, a.out, b.region);
      for (int64_t k = 0; k < n; ++k) {
        const float r = saved[l + k];
        const Pair by = both(rstd[k]);
        const Pair back = both(splat(r < ceiling ? r * r * (sum(dot[k]) * inverse) : 0.0f));
        const T* row = x + (l + k) * x_step;
        const float* term = h[k];
        write_pairs(dx + (l + k) * a.out.stride[2], width, a.stream, [&](int64_t d, auto io) {
          return sub_mul(load_pair(term + d) * by, io.get(row + d), back);
        });
      }
    });
    if (a.sum_du) disarrange<T>(a.sum_du + unit * width, du_sum.total, width);
    if (a.sum_duxhat) disarrange<T>(a.sum_duxhat + unit * width, duxhat_sum.total, width);
  }
}

// --- channels first: a block of positions, channel by channel ------------------------------------------

template <class T, bool kSilu>
void fwd_first(const NormSiluFwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.block, 1);
  float* rstd = scratch.row();
  const Vec inverse = splat(1.0f / static_cast<float>(a.width));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const int64_t n = b.end - b.begin;
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin;
    T* y = region_of<T>(a, a.out, b.region) + b.begin;
    std::memset(rstd, 0, whole_pairs(n) * sizeof(float));
    for (int64_t c = 0; c < a.width; ++c) {
      const T* row = x + c * a.x.stride[3];
      for_pairs(n, [&](int64_t l, auto io) {
        const Pair v = io.get(row + l);
        store_pair(rstd + l, mul_add(v, v, load_pair(rstd + l)));
      });
    }
    for (int64_t l = 0; l < whole_pairs(n); l += kLanes)
      store(rstd + l, rstd_of(a, load(rstd + l) * inverse));
    disarrange<T>(a.rstd + b.region * a.length + b.begin, rstd, n);
    for (int64_t c = 0; c < a.width; ++c) {
      const T* row = x + c * a.x.stride[3];
      const Pair weight = both(splat(a.weight[c])), bias = both(splat(a.bias[c]));
      write_pairs(y + c * a.out.stride[3], n, a.stream, [&](int64_t l, auto io) {
        return activate<kSilu>(mul_add(io.get(row + l) * load_pair(rstd + l), weight, bias));
      });
    }
  }
}

template <class T, bool kSilu>
void bwd_first(const NormSiluBwd& a, int64_t begin, int64_t end) {
  const int64_t step = whole_pairs(a.block) + 16;  // not a power of two: it would share cache sets
  Scratch scratch(step, 2), terms(step * a.width, 1);
  float *rstd = scratch.row(), *scale = scratch.row();
  float* h = a.out.data ? terms.row() : nullptr;  // du * weight, a row per channel
  const Vec inverse = splat(1.0f / static_cast<float>(a.width)), ceiling = splat(1.0f / a.floor);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const int64_t n = b.end - b.begin;
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin;
    const T* dy = region_of<const T>(a, a.dy, b.region) + b.begin;
    arrange<T>(rstd, a.rstd + b.region * a.length + b.begin, n);
    std::memset(scale, 0, whole_pairs(n) * sizeof(float));
    for (int64_t c = 0; c < a.width; ++c) {
      const T *row = x + c * a.x.stride[3], *grad = dy + c * a.dy.stride[3];
      const Pair weight = both(splat(a.weight[c])), bias = both(splat(a.bias[c]));
      float* term = h ? h + c * step : nullptr;
      Pair du_total{}, duxhat_total{};
      for_pairs(n, [&](int64_t l, auto io) {
        const Pair xhat = io.get(row + l) * load_pair(rstd + l);
        const Pair du = slope<kSilu>(mul_add(xhat, weight, bias), io.get(grad + l));
        du_total = du_total + du;
        duxhat_total = mul_add(du, xhat, duxhat_total);
        if (!term) return;
        const Pair scaled = du * weight;
        store_pair(term + l, scaled);
        store_pair(scale + l, mul_add(scaled, xhat, load_pair(scale + l)));
      });
      if (a.sum_du) a.sum_du[unit * a.width + c] = sum(du_total.a + du_total.b);
      if (a.sum_duxhat) a.sum_duxhat[unit * a.width + c] = sum(duxhat_total.a + duxhat_total.b);
    }
    if (!h) continue;
    for (int64_t l = 0; l < whole_pairs(n); l += kLanes) {
      const Vec r = load(rstd + l);
      store(scale + l, select((IVec)(r < ceiling), r * r * (load(scale + l) * inverse), Vec{}));
    }
    T* dx = region_of<T>(a, a.out, b.region) + b.begin;
    for (int64_t c = 0; c < a.width; ++c) {
      const T* row = x + c * a.x.stride[3];
      const float* term = h + c * step;
      write_pairs(dx + c * a.out.stride[3], n, a.stream, [&](int64_t l, auto io) {
        return sub_mul(load_pair(term + l) * load_pair(rstd + l), io.get(row + l),
                       load_pair(scale + l));
      });
    }
  }
}

}  // namespace

void norm_silu_rms_fwd(const NormSiluFwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t, auto silu) {
    using T = decltype(t);
    a.last ? fwd_last<T, silu.value>(a, begin, end) : fwd_first<T, silu.value>(a, begin, end);
  });
}
void norm_silu_rms_bwd(const NormSiluBwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t, auto silu) {
    using T = decltype(t);
    a.last ? bwd_last<T, silu.value>(a, begin, end) : bwd_first<T, silu.value>(a, begin, end);
  });
}

}  // namespace sora::SORA_ISA
