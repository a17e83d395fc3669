// Row kernels of norm_silu. Compiled once per instruction set; no torch headers.
#include "norm_silu.h"

#include "scratch.h"
#include "silu.h"

namespace sora::SORA_ISA {
namespace {

template <int N>
struct Registers {
  static constexpr int count = N;
};

// Calls body(offset, io, Registers<N>) over n positions, N registers at a time: with channels
// first, a line of each channel is far from the next, so that several are taken at once.
template <class Body>
void for_tiles(int64_t n, Body&& body) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= n; d += 4 * kLanes) body(d, Full{}, Registers<4>{});
  for (; d + kLanes <= n; d += kLanes) body(d, Full{}, Registers<1>{});
  if (d < n) body(d, Tail{n - d}, Registers<1>{});
}

template <class T>
void put(T* p, Vec v, bool past_cache, Full io) {
  if (past_cache && can_stream(p)) stream(p, v);
  else io.put(p, v);
}
template <class T>
void put(T* p, Vec v, bool, Tail io) { io.put(p, v); }

struct Block {
  int64_t region, begin, end;  // positions
};
Block block_at(const NormSilu& a, int64_t unit) {
  const int64_t begin = unit % a.blocks * a.block;
  const int64_t end = begin + a.block;
  return {unit / a.blocks, begin, end < a.length ? end : a.length};
}
template <class T>
T* region_of(const NormSilu& a, const Regions& x, int64_t region) {
  return const_cast<T*>(static_cast<const T*>(x.data)) + region / a.frames * x.stride[0] +
         region % a.frames * x.stride[1];
}

inline Vec activate(const NormSilu& a, Vec u) { return a.silu ? silu(u) : u; }
inline Vec slope(const NormSilu& a, Vec u, Vec dy) { return a.silu ? dy * silu_derivative(u) : dy; }

inline Vec rstd_of(const NormSilu& a, Vec mean_square) {
  float v[kLanes];
  store(v, mean_square + splat(a.eps));
  for (float& s : v) {
    const float root = std::sqrt(s);
    s = 1.0f / (root < a.floor ? a.floor : root);
  }
  return load(v);
}

// Sums over the positions of a block, a row over channels. Every few positions are summed by
// themselves: 128 additions in a row would cost digits.
struct BlockSum {
  float *total, *part;
  int64_t size;
  BlockSum(Scratch& scratch, int64_t count)
      : total(scratch.row()), part(scratch.row()), size(count) {}
  void clear() {
    std::memset(total, 0, size * sizeof(float));
    std::memset(part, 0, size * sizeof(float));
  }
  void fold() {
    for_row(size, [&](int64_t d, auto io) {
      io.put(total + d, io.get(total + d) + io.get(part + d));
      io.put(part + d, Vec{});
    });
  }
};
constexpr int64_t kFold = 16;  // positions

// --- RMS: statistics per position -------------------------------------------------------------

template <class T>
void rms_fwd_last(const NormSiluFwd& a, int64_t begin, int64_t end) {
  const float inverse = 1.0f / static_cast<float>(a.width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const T* x = region_of<const T>(a, a.x, b.region);
    T* y = region_of<T>(a, a.out, b.region);
    for (int64_t l = b.begin; l < b.end; ++l) {
      const T* row = x + l * a.x.stride[2];
      const float square = inverse * sum_row(a.width, [&](int64_t d, auto io) {
        const Vec v = io.get(row + d);
        return v * v;
      });
      const float root = std::sqrt(square + a.eps);
      const float rstd = 1.0f / (root < a.floor ? a.floor : root);
      a.rstd[b.region * a.length + l] = rstd;
      write_row(y + l * a.out.stride[2], a.width, a.stream, [&](int64_t d, auto io) {
        return activate(a, io.get(row + d) * splat(rstd) * io.get(a.weight + d) +
                               io.get(a.bias + d));
      });
    }
  }
}

template <class T>
void rms_fwd_first(const NormSiluFwd& a, int64_t begin, int64_t end) {
  const Vec inverse = splat(1.0f / static_cast<float>(a.width));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin;
    T* y = region_of<T>(a, a.out, b.region) + b.begin;
    float* saved = a.rstd + b.region * a.length + b.begin;
    for_tiles(b.end - b.begin, [&](int64_t l, auto io, auto registers) {
      constexpr int n = decltype(registers)::count;
      Vec rstd[n] = {};
      for (int64_t c = 0; c < a.width; ++c)
        for (int k = 0; k < n; ++k) {
          const Vec v = io.get(x + c * a.x.stride[3] + l + k * kLanes);
          rstd[k] = rstd[k] + v * v;
        }
      for (int k = 0; k < n; ++k) {
        rstd[k] = rstd_of(a, rstd[k] * inverse);
        io.put(saved + l + k * kLanes, rstd[k]);
      }
      for (int64_t c = 0; c < a.width; ++c)
        for (int k = 0; k < n; ++k) {
          const Vec v = io.get(x + c * a.x.stride[3] + l + k * kLanes);
          put(y + c * a.out.stride[3] + l + k * kLanes,
              activate(a, v * rstd[k] * splat(a.weight[c]) + splat(a.bias[c])), a.stream, io);
        }
    });
  }
}

// With h = du * weight: dx = rstd * (h - xhat * mean(h * xhat)); where the floor held, rstd * h.
template <class T>
void rms_bwd_last(const NormSiluBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 5);
  float* h = scratch.row();
  BlockSum du_sum(scratch, a.width), duxhat_sum(scratch, a.width);
  const float inverse = 1.0f / static_cast<float>(a.width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const T* x = region_of<const T>(a, a.x, b.region);
    const T* dy = region_of<const T>(a, a.dy, b.region);
    du_sum.clear();
    duxhat_sum.clear();
    for (int64_t l = b.begin; l < b.end; ++l) {
      const T* row = x + l * a.x.stride[2];
      const T* grad = dy + l * a.dy.stride[2];
      const float saved = a.rstd[b.region * a.length + l];
      const Vec rstd = splat(saved);
      const float dot = sum_row(a.width, [&](int64_t d, auto io) {
        const Vec xhat = io.get(row + d) * rstd;
        const Vec weight = io.get(a.weight + d);
        const Vec du = slope(a, xhat * weight + io.get(a.bias + d), io.get(grad + d));
        if (a.sum_du) io.put(du_sum.part + d, io.get(du_sum.part + d) + du);
        if (a.sum_duxhat)
          io.put(duxhat_sum.part + d, io.get(duxhat_sum.part + d) + du * xhat);
        io.put(h + d, du * weight);
        return du * weight * xhat;
      });
      if (l % kFold == kFold - 1 || l + 1 == b.end) {
        if (a.sum_du) du_sum.fold();
        if (a.sum_duxhat) duxhat_sum.fold();
      }
      if (!a.out.data) continue;
      const Vec scale = splat(saved < 1.0f / a.floor ? dot * inverse : 0.0f);
      T* dx = region_of<T>(a, a.out, b.region) + l * a.out.stride[2];
      write_row(dx, a.width, a.stream, [&](int64_t d, auto io) {
        return rstd * (io.get(h + d) - io.get(row + d) * rstd * scale);
      });
    }
    const int64_t bytes = a.width * sizeof(float);
    if (a.sum_du) std::memcpy(a.sum_du + unit * a.width, du_sum.total, bytes);
    if (a.sum_duxhat) std::memcpy(a.sum_duxhat + unit * a.width, duxhat_sum.total, bytes);
  }
}

template <class T>
void rms_bwd_first(const NormSiluBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width * kLanes, 2);  // running sums, a register per channel
  float* du_sum = scratch.row();
  float* duxhat_sum = scratch.row();
  const Vec inverse = splat(1.0f / static_cast<float>(a.width)), ceiling = splat(1.0f / a.floor);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin;
    const T* dy = region_of<const T>(a, a.dy, b.region) + b.begin;
    const float* saved = a.rstd + b.region * a.length + b.begin;
    std::memset(du_sum, 0, a.width * sizeof(Vec));
    std::memset(duxhat_sum, 0, a.width * sizeof(Vec));
    for_tiles(b.end - b.begin, [&](int64_t l, auto io, auto registers) {
      constexpr int n = decltype(registers)::count;
      Vec rstd[n], scale[n] = {};
      for (int k = 0; k < n; ++k) rstd[k] = io.get(saved + l + k * kLanes);
      auto terms = [&](int64_t c, int k, Vec& xhat) {
        xhat = io.get(x + c * a.x.stride[3] + l + k * kLanes) * rstd[k];
        return slope(a, xhat * splat(a.weight[c]) + splat(a.bias[c]),
                     io.get(dy + c * a.dy.stride[3] + l + k * kLanes));
      };
      for (int64_t c = 0; c < a.width; ++c) {
        Vec du_total = Vec{}, duxhat_total = Vec{};
        for (int k = 0; k < n; ++k) {
          Vec xhat;
          const Vec du = terms(c, k, xhat);
          du_total = du_total + du;
          duxhat_total = duxhat_total + du * xhat;
          scale[k] = scale[k] + du * splat(a.weight[c]) * xhat;
        }
        store(du_sum + c * kLanes, load(du_sum + c * kLanes) + du_total);
        store(duxhat_sum + c * kLanes, load(duxhat_sum + c * kLanes) + duxhat_total);
      }
      if (!a.out.data) return;
      T* dx = region_of<T>(a, a.out, b.region) + b.begin;
      for (int k = 0; k < n; ++k)
        scale[k] = select((IVec)(rstd[k] < ceiling), scale[k] * inverse, Vec{});
      for (int64_t c = 0; c < a.width; ++c)
        for (int k = 0; k < n; ++k) {
          Vec xhat;
          const Vec du = terms(c, k, xhat);
          put(dx + c * a.out.stride[3] + l + k * kLanes,
              rstd[k] * (du * splat(a.weight[c]) - xhat * scale[k]), a.stream, io);
        }
    });
    for (int64_t c = 0; c < a.width; ++c) {
      if (a.sum_du) a.sum_du[unit * a.width + c] = sum(load(du_sum + c * kLanes));
      if (a.sum_duxhat) a.sum_duxhat[unit * a.width + c] = sum(load(duxhat_sum + c * kLanes));
    }
  }
}

// --- GroupNorm: statistics per region and group -----------------------------------------------

// Mean of every channel over a block, then the squares around it: no cancellation.
template <class T>
void group_stats(const NormSiluFwd& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin * a.x.stride[2];
    const int64_t n = b.end - b.begin;
    const float inverse = 1.0f / static_cast<float>(n);
    float* mean = a.block_mean + unit * a.width;
    float* m2 = a.block_m2 + unit * a.width;
    if (!a.last) {
      for (int64_t c = 0; c < a.width; ++c) {
        const T* row = x + c * a.x.stride[3];
        mean[c] = inverse * sum_row(n, [&](int64_t d, auto io) { return io.get(row + d); });
        m2[c] = sum_row(n, [&](int64_t d, auto io) {
          const Vec v = io.get(row + d) - splat(mean[c]);
          return v * v;
        });
      }
      continue;
    }
    for_row(a.width, [&](int64_t d, auto io) {
      Vec total = Vec{};
      for (int64_t l = 0; l < n; ++l) total = total + io.get(x + l * a.x.stride[2] + d);
      const Vec centre = total * splat(inverse);
      io.put(mean + d, centre);
      total = Vec{};
      for (int64_t l = 0; l < n; ++l) {
        const Vec v = io.get(x + l * a.x.stride[2] + d) - centre;
        total = total + v * v;
      }
      io.put(m2 + d, total);
    });
  }
}

// Statistics of a region as rows over its channels.
struct Channels {
  const NormSilu& a;
  Scratch scratch;
  float *mean, *rstd, *c1, *c2;
  int64_t loaded = -1;

  explicit Channels(const NormSilu& args)
      : a(args), scratch(args.width, 4), mean(scratch.row()), rstd(scratch.row()),
        c1(scratch.row()), c2(scratch.row()) {}

  void load(int64_t region, const float* means1 = nullptr, const float* means2 = nullptr) {
    if (region == loaded) return;
    loaded = region;
    const int64_t size = a.width / a.groups;
    for (int64_t c = 0; c < a.width; ++c) {
      const int64_t group = region * a.groups + c / size;
      mean[c] = a.mean[group];
      rstd[c] = a.rstd[group];
      c1[c] = means1 ? means1[group] : 0.0f;
      c2[c] = means2 ? means2[group] : 0.0f;
    }
  }
};

// Calls body(c, l, io, per_channel) over the registers of a block. per_channel(row) is the value
// of a row over channels at this register: a load where channels come last, else a splat.
template <class Body>
void for_block(const NormSilu& a, int64_t positions, Body&& body) {
  if (a.last) {
    for (int64_t l = 0; l < positions; ++l)
      for_row(a.width, [&](int64_t c, auto io) {
        body(c, l, io, [&](const float* row) { return io.get(row + c); });
      });
  } else {
    for (int64_t c = 0; c < a.width; ++c)
      for_row(positions, [&](int64_t l, auto io) {
        body(c, l, io, [&](const float* row) { return splat(row[c]); });
      });
  }
}

int64_t offset(const Regions& x, int64_t l, int64_t c) { return l * x.stride[2] + c * x.stride[3]; }

template <class T>
void group_fwd(const NormSiluFwd& a, int64_t begin, int64_t end) {
  Channels channels(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    channels.load(b.region);
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin * a.x.stride[2];
    T* y = region_of<T>(a, a.out, b.region) + b.begin * a.out.stride[2];
    for_block(a, b.end - b.begin, [&](int64_t c, int64_t l, auto io, auto of) {
      const Vec xhat = (io.get(x + offset(a.x, l, c)) - of(channels.mean)) * of(channels.rstd);
      put(y + offset(a.out, l, c), activate(a, xhat * of(a.weight) + of(a.bias)), a.stream, io);
    });
  }
}

template <class T>
void group_sums(const NormSiluBwd& a, int64_t begin, int64_t end) {
  Channels channels(a);
  Scratch scratch(a.width, 4);
  BlockSum du_sum(scratch, a.width), duxhat_sum(scratch, a.width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    channels.load(b.region);
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin * a.x.stride[2];
    const T* dy = region_of<const T>(a, a.dy, b.region) + b.begin * a.dy.stride[2];
    float* out1 = a.sum_du + unit * a.width;
    float* out2 = a.sum_duxhat + unit * a.width;
    if (!a.last) {
      for (int64_t c = 0; c < a.width; ++c) {
        const Vec mean = splat(channels.mean[c]), rstd = splat(channels.rstd[c]);
        const Vec weight = splat(a.weight[c]), bias = splat(a.bias[c]);
        const Sums sums = sum_row2(b.end - b.begin, [&](int64_t l, auto io) {
          const Vec xhat = (io.get(x + offset(a.x, l, c)) - mean) * rstd;
          const Vec du = slope(a, xhat * weight + bias, io.get(dy + offset(a.dy, l, c)));
          return VecPair{du, du * xhat};
        });
        out1[c] = sums.first;
        out2[c] = sums.second;
      }
      continue;
    }
    du_sum.clear();
    duxhat_sum.clear();
    for (int64_t l = 0; l < b.end - b.begin; ++l) {
      for_row(a.width, [&](int64_t c, auto io) {
        const Vec xhat =
            (io.get(x + offset(a.x, l, c)) - io.get(channels.mean + c)) * io.get(channels.rstd + c);
        const Vec du = slope(a, xhat * io.get(a.weight + c) + io.get(a.bias + c),
                             io.get(dy + offset(a.dy, l, c)));
        io.put(du_sum.part + c, io.get(du_sum.part + c) + du);
        io.put(duxhat_sum.part + c, io.get(duxhat_sum.part + c) + du * xhat);
      });
      if (l % kFold == kFold - 1 || l + 1 == b.end - b.begin) {
        du_sum.fold();
        duxhat_sum.fold();
      }
    }
    std::memcpy(out1, du_sum.total, a.width * sizeof(float));
    std::memcpy(out2, duxhat_sum.total, a.width * sizeof(float));
  }
}

// dx = rstd * (du * weight - c1 - xhat * c2).
template <class T>
void group_bwd(const NormSiluBwd& a, int64_t begin, int64_t end) {
  Channels channels(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block b = block_at(a, unit);
    channels.load(b.region, a.c1, a.c2);
    const T* x = region_of<const T>(a, a.x, b.region) + b.begin * a.x.stride[2];
    const T* dy = region_of<const T>(a, a.dy, b.region) + b.begin * a.dy.stride[2];
    T* dx = region_of<T>(a, a.out, b.region) + b.begin * a.out.stride[2];
    for_block(a, b.end - b.begin, [&](int64_t c, int64_t l, auto io, auto of) {
      const Vec rstd = of(channels.rstd), weight = of(a.weight);
      const Vec xhat = (io.get(x + offset(a.x, l, c)) - of(channels.mean)) * rstd;
      const Vec du = slope(a, xhat * weight + of(a.bias), io.get(dy + offset(a.dy, l, c)));
      put(dx + offset(a.out, l, c), rstd * (du * weight - of(channels.c1) - xhat * of(channels.c2)),
          a.stream, io);
    });
  }
}

template <class Args, class Run>
void by_type(const Args& a, Run run) {
  if (a.type == DType::bf16) run(bf16{});
  else if (a.type == DType::f16) run(f16{});
  else run(float{});
  if (a.stream) stream_fence();
}

}  // namespace

void norm_silu_rms_fwd(const NormSiluFwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t) {
    a.last ? rms_fwd_last<decltype(t)>(a, begin, end) : rms_fwd_first<decltype(t)>(a, begin, end);
  });
}
void norm_silu_rms_bwd(const NormSiluBwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t) {
    a.last ? rms_bwd_last<decltype(t)>(a, begin, end) : rms_bwd_first<decltype(t)>(a, begin, end);
  });
}
void norm_silu_group_stats(const NormSiluFwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t) { group_stats<decltype(t)>(a, begin, end); });
}
void norm_silu_group_fwd(const NormSiluFwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t) { group_fwd<decltype(t)>(a, begin, end); });
}
void norm_silu_group_sums(const NormSiluBwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t) { group_sums<decltype(t)>(a, begin, end); });
}
void norm_silu_group_bwd(const NormSiluBwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto t) { group_bwd<decltype(t)>(a, begin, end); });
}

}  // namespace sora::SORA_ISA
