// GroupNorm kernels of norm_silu: statistics per region and group of channels. No torch headers.
#include <type_traits>

#include "norm_silu_rows.h"

namespace sora::SORA_ISA {
namespace {

// What a channel multiplies and adds: rows over channels, in the order of pairs of T where channels
// come last.
template <class T>
struct Channels {
  const NormSilu& a;
  Scratch scratch;
  float *mean, *rstd, *weight, *bias, *c1, *c2;

  explicit Channels(const NormSilu& args)
      : a(args), scratch(args.width, 7), mean(scratch.row()), rstd(scratch.row()),
        weight(scratch.row()), bias(scratch.row()), c1(scratch.row()), c2(scratch.row()),
        plain_(scratch.row()) {
    put(weight, a.weight, 0, a.width);
    put(bias, a.bias, 0, a.width);
  }

  void load(const NormSiluPart& part, const float* means1 = nullptr, const float* means2 = nullptr) {
    spread(mean, a.mean, part);
    spread(rstd, a.rstd, part);
    if (means1) spread(c1, means1, part);
    if (means2) spread(c2, means2, part);
  }

 private:
  void spread(float* to, const float* of_groups, const NormSiluPart& part) {
    const int64_t size = a.width / a.groups;
    const float* from = of_groups + part.region * a.groups;
    for (int64_t c = part.channel; c < part.channel_end; ++c) plain_[c] = from[c / size];
    put(to, plain_, part.channel, part.channel_end);
  }
  void put(float* to, const float* from, int64_t begin, int64_t end) {
    if (a.last) arrange<T>(to, from, a.width);
    else std::memcpy(to + begin, from + begin, (end - begin) * sizeof(float));
  }
  float* plain_;
};

// Mean and squared differences of a channel over a block that is contiguous: two passes, the second
// from the cache.
template <class T>
void stats_first(const T* row, int64_t n, float* mean, float* m2) {
  Pair s0{}, s1{};
  int64_t l = 0;
  for (; l + 2 * kPair <= n; l += 2 * kPair) {
    s0 = s0 + load_pair(row + l);
    s1 = s1 + load_pair(row + l + kPair);
  }
  for_pairs(n - l, [&](int64_t d, auto io) { s0 = s0 + io.get(row + l + d); });
  *mean = sum((s0.a + s1.a) + (s0.b + s1.b)) / static_cast<float>(n);
  const Pair centre = both(splat(*mean));
  s0 = s1 = Pair{};
  for (l = 0; l + 2 * kPair <= n; l += 2 * kPair) {
    const Pair u = load_pair(row + l) - centre, v = load_pair(row + l + kPair) - centre;
    s0 = mul_add(u, u, s0);
    s1 = mul_add(v, v, s1);
  }
  for_pairs(n - l, [&](int64_t d, auto io) {
    const Pair v = io.template only<T>(io.get(row + l + d) - centre);
    s0 = mul_add(v, v, s0);
  });
  *m2 = sum((s0.a + s1.a) + (s0.b + s1.b));
}

// The same for all channels of a block, one pass: sums of v and v^2 of v = x - pivot, the pivot a mean
// of kRows positions. It is so near the mean of the block that the difference of the sums loses at
// most log2(block / kRows) bits.
template <class T>
void stats_last(const T* x, int64_t step, int64_t n, int64_t width, Scratch& scratch, float* mean,
                float* m2) {
  float *pivot = scratch.row(), *first = scratch.row(), *second = scratch.row();
  const int64_t few = n < kRows ? n : kRows;
  for_pairs(width, [&](int64_t c, auto io) {
    Pair total{};
    for (int64_t l = 0; l < few; ++l) total = total + io.get(x + l * step + c);
    store_pair(pivot + c, total * both(splat(1.0f / static_cast<float>(few))));
    store_pair(first + c, Pair{});
    store_pair(second + c, Pair{});
  });
  int64_t l = 0;
  auto rows = [&](auto count) {
    for_pairs(width, [&](int64_t c, auto io) {
      const Pair at = load_pair(pivot + c);
      Pair s1 = load_pair(first + c), s2 = load_pair(second + c);
      for (int64_t k = 0; k < decltype(count)::value; ++k) {
        const Pair v = io.get(x + (l + k) * step + c) - at;
        s1 = s1 + v;
        s2 = mul_add(v, v, s2);
      }
      store_pair(first + c, s1);
      store_pair(second + c, s2);
    });
    l += decltype(count)::value;
  };
  while (l + kRows <= n) rows(std::integral_constant<int64_t, kRows>{});
  while (l < n) rows(std::integral_constant<int64_t, 1>{});
  const Pair inverse = both(splat(1.0f / static_cast<float>(n)));
  for (int64_t c = 0; c < whole_pairs(width); c += kPair) {
    const Pair s1 = load_pair(first + c), apart = s1 * inverse;
    store_pair(second + c, sub_mul(load_pair(second + c), s1, apart));
    store_pair(first + c, load_pair(pivot + c) + apart);
  }
  disarrange<T>(mean, first, width);
  disarrange<T>(m2, second, width);
}

template <class T>
void stats(const NormSiluFwd& a, const NormSiluPart& part) {
  for (int64_t k = part.block; k < part.block_end; ++k) {
    const int64_t unit = part.region * a.blocks + k;
    const Block b = block_at(a, unit);
    const int64_t n = b.end - b.begin;
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin * a.x.stride[2];
    float *mean = a.block_mean + unit * a.width, *m2 = a.block_m2 + unit * a.width;
    if (a.last) {
      Scratch scratch(a.width, 3);
      stats_last(x, a.x.stride[2], n, a.width, scratch, mean, m2);
      continue;
    }
    for (int64_t c = part.channel; c < part.channel_end; ++c)
      stats_first(x + c * a.x.stride[3], n, mean + c, m2 + c);
  }
}

// out = value(x, dy, channel rows at this place) over a part; of_rows(row) is the value of a row over
// channels there: a load where channels come last, else a splat.
template <class T, class Value>
void map_part(const NormSilu& a, const Regions* upstream, const NormSiluPart& part, Value&& value) {
  const Regions& second = upstream ? *upstream : a.x;
  for (int64_t k = part.block; k < part.block_end; ++k) {
    const Block b = block_at(a, part.region * a.blocks + k);
    const int64_t n = b.end - b.begin;
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin * a.x.stride[2];
    const T* dy = region_of<const T>(a, second, b.region) + b.begin * second.stride[2];
    T* out = region_of<T>(a, a.out, b.region) + b.begin * a.out.stride[2];
    if (a.last) {
      for (int64_t l = 0; l < n; ++l) {
        const T *row = x + l * a.x.stride[2], *grad = dy + l * second.stride[2];
        write_pairs(out + l * a.out.stride[2], a.width, a.stream, [&](int64_t c, auto io) {
          return value(io, row + c, grad + c, [&](const float* of) { return load_pair(of + c); });
        });
      }
      continue;
    }
    for (int64_t c = part.channel; c < part.channel_end; ++c) {
      const T *row = x + c * a.x.stride[3], *grad = dy + c * second.stride[3];
      write_pairs(out + c * a.out.stride[3], n, a.stream, [&](int64_t l, auto io) {
        return value(io, row + l, grad + l, [&](const float* of) { return both(splat(of[c])); });
      });
    }
  }
}

template <class T, bool kSilu>
void fwd(const NormSiluFwd& a, const NormSiluPart& part) {
  Channels<T> channels(a);
  channels.load(part);
  const float *mean = channels.mean, *rstd = channels.rstd;
  const float *weight = channels.weight, *bias = channels.bias;
  map_part<T>(a, nullptr, part, [&](auto io, const T* x, const T*, auto at) {
    const Pair xhat = (io.get(x) - at(mean)) * at(rstd);
    return activate<kSilu>(mul_add(xhat, at(weight), at(bias)));
  });
}

// dx = rstd * (du * weight - c1 - xhat * c2).
template <class T, bool kSilu>
void bwd(const NormSiluBwd& a, const NormSiluPart& part) {
  Channels<T> channels(a);
  channels.load(part, a.c1, a.c2);
  const float *mean = channels.mean, *rstd = channels.rstd, *c1 = channels.c1, *c2 = channels.c2;
  const float *weight = channels.weight, *bias = channels.bias;
  map_part<T>(a, &a.dy, part, [&](auto io, const T* x, const T* dy, auto at) {
    const Pair r = at(rstd), w = at(weight);
    const Pair xhat = (io.get(x) - at(mean)) * r;
    const Pair du = slope<kSilu>(mul_add(xhat, w, at(bias)), io.get(dy));
    return r * (sub_mul(du * w, xhat, at(c2)) - at(c1));
  });
}

template <class T, bool kSilu>
void sums_first(const NormSiluBwd& a, const Channels<T>& of, const NormSiluPart& part, int64_t unit) {
  const Block b = block_at(a, unit);
  const T* x = region_of<const T>(a, a.x, b.region) + b.begin;
  const T* dy = region_of<const T>(a, a.dy, b.region) + b.begin;
  for (int64_t c = part.channel; c < part.channel_end; ++c) {
    const T *row = x + c * a.x.stride[3], *grad = dy + c * a.dy.stride[3];
    const Pair mean = both(splat(of.mean[c])), rstd = both(splat(of.rstd[c]));
    const Pair weight = both(splat(of.weight[c])), bias = both(splat(of.bias[c]));
    Pair first{}, second{};
    for_pairs(b.end - b.begin, [&](int64_t l, auto io) {
      const Pair xhat = (io.get(row + l) - mean) * rstd;
      const Pair du = slope<kSilu>(mul_add(xhat, weight, bias), io.get(grad + l));
      first = first + du;
      second = mul_add(du, xhat, second);
    });
    a.sum_du[unit * a.width + c] = sum(first.a + first.b);
    a.sum_duxhat[unit * a.width + c] = sum(second.a + second.b);
  }
}

template <class T, bool kSilu>
void sums_last(const NormSiluBwd& a, const Channels<T>& of, int64_t unit, BlockSum& du_sum,
               BlockSum& duxhat_sum) {
  const Block b = block_at(a, unit);
  const int64_t x_step = a.x.stride[2], dy_step = a.dy.stride[2], n = b.end - b.begin;
  const T* x = region_of<const T>(a, a.x, b.region) + b.begin * x_step;
  const T* dy = region_of<const T>(a, a.dy, b.region) + b.begin * dy_step;
  du_sum.clear();
  duxhat_sum.clear();
  int64_t l = 0;
  auto rows = [&](auto count) {
    for_pairs(a.width, [&](int64_t c, auto io) {
      const Pair mean = load_pair(of.mean + c), rstd = load_pair(of.rstd + c);
      const Pair weight = load_pair(of.weight + c), bias = load_pair(of.bias + c);
      Pair first = load_pair(du_sum.part + c), second = load_pair(duxhat_sum.part + c);
      for (int64_t k = 0; k < decltype(count)::value; ++k) {
        const Pair xhat = (io.get(x + (l + k) * x_step + c) - mean) * rstd;
        const Pair du =
            slope<kSilu>(mul_add(xhat, weight, bias), io.get(dy + (l + k) * dy_step + c));
        first = first + du;
        second = mul_add(du, xhat, second);
      }
      store_pair(du_sum.part + c, first);
      store_pair(duxhat_sum.part + c, second);
    });
    l += decltype(count)::value;
    if (l % kFold == 0 || l == n) {
      du_sum.fold();
      duxhat_sum.fold();
    }
  };
  while (l + kRows <= n) rows(std::integral_constant<int64_t, kRows>{});
  while (l < n) rows(std::integral_constant<int64_t, 1>{});
  disarrange<T>(a.sum_du + unit * a.width, du_sum.total, a.width);
  disarrange<T>(a.sum_duxhat + unit * a.width, duxhat_sum.total, a.width);
}

template <class T, bool kSilu>
void sums(const NormSiluBwd& a, const NormSiluPart& part) {
  Channels<T> channels(a);
  channels.load(part);
  Scratch scratch(a.width, 4);
  BlockSum du_sum(scratch, a.width), duxhat_sum(scratch, a.width);
  for (int64_t k = part.block; k < part.block_end; ++k) {
    const int64_t unit = part.region * a.blocks + k;
    if (a.last) sums_last<T, kSilu>(a, channels, unit, du_sum, duxhat_sum);
    else sums_first<T, kSilu>(a, channels, part, unit);
  }
}

}  // namespace

void norm_silu_group_stats(const NormSiluFwd& a, const NormSiluPart& part) {
  by_type(a, [&](auto t, auto) { stats<decltype(t)>(a, part); });
}
void norm_silu_group_fwd(const NormSiluFwd& a, const NormSiluPart& part) {
  by_type(a, [&](auto t, auto silu) { fwd<decltype(t), silu.value>(a, part); });
}
void norm_silu_group_sums(const NormSiluBwd& a, const NormSiluPart& part) {
  by_type(a, [&](auto t, auto silu) { sums<decltype(t), silu.value>(a, part); });
}
void norm_silu_group_bwd(const NormSiluBwd& a, const NormSiluPart& part) {
  by_type(a, [&](auto t, auto silu) { bwd<decltype(t), silu.value>(a, part); });
}

}  // namespace sora::SORA_ISA
