// Row kernels of gate_residual_norm_modulate. Compiled once per instruction set; no torch headers.
#include "gate_residual_norm_modulate.h"

#include <cmath>
#include <initializer_list>

#include "grouped_sum.h"
#include "law.h"
#include "modulation.h"
#include "scratch.h"
#include "vec.h"

namespace sora::SORA_ISA {
namespace {


// Every modulation of the current row, as fp32 rows.
template <class Ty, class Tout, bool Law>
class Modulation {
 public:
  const float* gate[kMaxBranches] = {};
  const float* one_plus = nullptr;
  const float* shift = nullptr;

  Modulation(const GateResidualNormModulate& args, Scratch& scratch) : a_(args) {
    for (float*& row : memory_) row = scratch.row();
  }
  static constexpr int kRows = kMaxBranches + 2;

  void load(int64_t row, bool with_shift) {
    const Round<Ty, Law> branch{a_.law};
    const Round<Tout, Law> out{a_.law};
    for (int b = 0; b < kMaxBranches; ++b)
      if (a_.gate[b].data)
        gate[b] = modulation_row(a_.gate[b], a_.gate_table[b], row, a_.width, branch, memory_[b]);
    if (a_.scale.data)
      one_plus = one_plus_row(a_.scale, a_.scale_table, row, a_.width, out, memory_[kMaxBranches]);
    if (a_.shift.data && with_shift)
      shift = modulation_row(a_.shift, a_.shift_table, row, a_.width, out,
                             memory_[kMaxBranches + 1]);
  }

 private:
  const GateResidualNormModulate& a_;
  float* memory_[kRows];
};

// The residual of one token at d: x + gate * y (+ gate2 * y2), rounded as the law says.
template <class Tx, class Ty, bool Law>
struct Residual {
  const Tx* x;
  const Ty* y[kMaxBranches];
  const float* gate[kMaxBranches];
  Round<Tx, Law> round_x;
  Round<Ty, Law> round_y;

  template <class Modulations>
  Residual(const GateResidualNormModulate& a, const Modulations& m, int64_t n)
      : x(token_row<Tx>(a.x, n)), round_x{a.law}, round_y{a.law} {
    for (int b = 0; b < kMaxBranches; ++b) {
      y[b] = a.y[b].data ? token_row<Ty>(a.y[b], n) : nullptr;
      gate[b] = m.gate[b];
    }
  }

  template <class Io>
  Vec branch(int b, int64_t d, Io io) const {
    const Vec v = io.get(y[b] + d);
    return gate[b] ? round_y(io.get(gate[b] + d) * v, kGated) : v;
  }
  template <class Io>
  Vec operator()(int64_t d, Io io) const {
    Vec r = io.get(x + d);
    if (y[0]) r = round_x(r + branch(0, d, io), kResidual);
    if (y[1]) r = round_x(r + branch(1, d, io), kResidual);
    return r;
  }
};

template <class Tx, class Ty, class Tout, bool Law>
void forward(const GateResidualNormModulateFwd& a, int64_t begin, int64_t end) {
  using Modulations = Modulation<Ty, Tout, Law>;
  Scratch scratch(a.width, Modulations::kRows + 1);
  Modulations modulation(a, scratch);
  const Round<Tout, Law> round{a.law};
  float* row = scratch.row();
  const int64_t width = a.width;
  const bool rms = !a.mean;
  const float inverse = 1.0f / static_cast<float>(width);
  int64_t loaded = -1;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t wanted = row_of(a.rows, n);
    if (wanted != loaded) modulation.load(loaded = wanted, true);
    const Residual<Tx, Ty, Law> residual(a, modulation, n);
    Tx* out = static_cast<Tx*>(a.residual) + n * width;
    const bool past_cache = a.stream && can_stream(out);
    float first = sum_row(width, [&](int64_t d, auto io) {
      const Vec r = residual(d, io);
      io.put(row + d, r);
      emit(out + d, r, past_cache, io);
      return rms ? r * r : r;
    });
    float mean = 0.0f;
    if (!rms) {
      mean = inverse * first;
      const Vec centre = splat(mean);
      first = sum_row(width, [&](int64_t d, auto io) {
        const Vec v = io.get(row + d) - centre;
        return v * v;
      });
    }
    const float rstd = 1.0f / std::sqrt(first * inverse + a.eps);
    if (a.mean) a.mean[n] = mean;
    a.rstd[n] = rstd;
    const Vec vmean = splat(mean), vrstd = splat(rstd);
    const float *weight = a.weight, *bias = a.bias;
    const float *one_plus = modulation.one_plus, *shift = modulation.shift;
    write_row(static_cast<Tout*>(a.normed) + n * width, width, a.stream, [&](int64_t d, auto io) {
      Vec v = round((io.get(row + d) - vmean) * vrstd, kXhat);
      if (weight) v = v * io.get(weight + d);
      if (bias) v = v + io.get(bias + d);
      v = round(v, kAffine);
      if (one_plus) v = round(v * io.get(one_plus + d), kProduct);
      if (shift) v = v + io.get(shift + d);
      return v;  // the store is the rounding of the sum
    });
  }
  if (a.stream) stream_fence();
}

// The running sums of one block of the backward; null where a gradient is not wanted.
struct Running {
  float *dgate[kMaxBranches] = {}, *dshift = nullptr, *dscale = nullptr;
  float *dweight = nullptr, *dbias = nullptr;
  static constexpr int kRows = kMaxBranches + 4;

  Running(const GateResidualNormModulateBwd& a, Scratch& scratch) {
    for (int b = 0; b < kMaxBranches; ++b)
      if (a.dgate[b].result) dgate[b] = scratch.row();
    if (a.dshift.result) dshift = scratch.row();
    if (a.dscale.result) dscale = scratch.row();
    if (a.dweight.result) dweight = scratch.row();
    if (a.dbias.result) dbias = scratch.row();
  }
  void start_block(int64_t width) { clear(dweight, width), clear(dbias, width); }
  void start_row(int64_t width) {
    for (float* sum : dgate) clear(sum, width);
    clear(dshift, width);
    clear(dscale, width);
  }
  void flush_row(const GateResidualNormModulateBwd& a, int64_t row, int64_t block) const {
    auto flush = [&](const RowGrad& g, const float* sum) {
      if (sum) flush_sum(g, a.rows, row, block, a.tokens, a.width, sum);
    };
    for (int b = 0; b < kMaxBranches; ++b) flush(a.dgate[b], dgate[b]);
    flush(a.dshift, dshift);
    flush(a.dscale, dscale);
  }
  void flush_block(const GateResidualNormModulateBwd& a, int64_t block) const {
    const int64_t bytes = a.width * sizeof(float);
    if (dweight) std::memcpy(a.dweight.partial + block * a.width, dweight, bytes);
    if (dbias) std::memcpy(a.dbias.partial + block * a.width, dbias, bytes);
  }

 private:
  static void clear(float* sum, int64_t width) {
    if (sum) std::memset(sum, 0, width * sizeof(float));
  }
};

template <class Io>
inline void add_to(float* sum, int64_t d, Vec v, Io io) {
  if (sum) io.put(sum + d, io.get(sum + d) + v);
}

// One token. With n = xhat * weight + bias and g = dnormed * (1 + scale): dshift += dnormed,
// dscale += dnormed * n, dweight += g * xhat, dbias += g; for h = g * weight the whole gradient of
// the residual is dr = dresidual + rstd * (h - mean(h) - xhat * mean(h * xhat)) (RMS: no mean(h)),
// and dx = dr, dy = gate * dr, dgate += dr * y.
template <class Tx, class Ty, class Tout, bool Law, class Modulations>
void backward_token(const GateResidualNormModulateBwd& a, int64_t n, const Modulations& m,
                    const Running& sums, float* xhat, float* dxhat) {
  const Residual<Tx, Ty, Law> residual(a, m, n);
  const Round<Tout, Law> round{a.law};
  const Tout* dnormed = token_row<Tout>(a.dnormed, n);
  const Vec mean = splat(a.mean ? a.mean[n] : 0.0f), rstd = splat(a.rstd[n]);
  const float *weight = a.weight, *bias = a.bias, *one_plus = m.one_plus;
  const Sums means = sum_row2(a.width, [&](int64_t d, auto io) {
    const Vec exact = (residual(d, io) - mean) * rstd;
    Vec g = io.get(dnormed + d);
    add_to(sums.dshift, d, g, io);
    const Vec rounded = round(exact, kXhat);
    if (sums.dscale) {
      Vec normed = rounded;
      if (weight) normed = normed * io.get(weight + d);
      if (bias) normed = normed + io.get(bias + d);
      add_to(sums.dscale, d, g * round(normed, kAffine), io);
    }
    if (one_plus) g = g * io.get(one_plus + d);
    add_to(sums.dweight, d, g * rounded, io);
    add_to(sums.dbias, d, g, io);
    if (weight) g = g * io.get(weight + d);
    io.put(xhat + d, exact);
    io.put(dxhat + d, g);
    return VecPair{g, g * exact};
  });
  const float inverse = 1.0f / static_cast<float>(a.width);
  const Vec c1 = splat(a.mean ? means.first * inverse : 0.0f), c2 = splat(means.second * inverse);
  const Tx* dresidual = a.dresidual.data ? token_row<Tx>(a.dresidual, n) : nullptr;
  Tx* dx = a.dx ? static_cast<Tx*>(a.dx) + n * a.width : nullptr;
  Ty* dy[kMaxBranches];
  bool past_cache = a.stream && (!dx || can_stream(dx));
  for (int b = 0; b < kMaxBranches; ++b) {
    dy[b] = a.dy[b] ? static_cast<Ty*>(a.dy[b]) + n * a.width : nullptr;
    past_cache = past_cache && (!dy[b] || can_stream(dy[b]));
  }
  for_row(a.width, [&](int64_t d, auto io) {
    Vec dr = rstd * (io.get(dxhat + d) - c1 - io.get(xhat + d) * c2);
    if (dresidual) dr = dr + io.get(dresidual + d);
    if (dx) emit(dx + d, dr, past_cache, io);
    for (int b = 0; b < kMaxBranches; ++b) {
      if (sums.dgate[b]) add_to(sums.dgate[b], d, dr * io.get(residual.y[b] + d), io);
      if (dy[b]) emit(dy[b] + d, m.gate[b] ? dr * io.get(m.gate[b] + d) : dr, past_cache, io);
    }
  });
}

// Blocks [begin, end) of kBlockTokens sorted tokens each.
template <class Tx, class Ty, class Tout, bool Law>
void backward(const GateResidualNormModulateBwd& a, int64_t begin, int64_t end) {
  using Modulations = Modulation<Ty, Tout, Law>;
  Scratch scratch(a.width, Modulations::kRows + Running::kRows + 2);
  Modulations modulation(a, scratch);
  Running sums(a, scratch);
  float* xhat = scratch.row();
  float* dxhat = scratch.row();
  const bool writes = a.dx || a.dy[0] || a.dy[1];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockTokens;
    const int64_t stop = start + kBlockTokens < a.tokens ? start + kBlockTokens : a.tokens;
    int64_t row = -1;
    sums.start_block(a.width);
    for (int64_t position = start; position < stop; ++position) {
      const int64_t n = token_at(a.rows, position);
      if (row_of(a.rows, n) != row) {
        if (row >= 0) sums.flush_row(a, row, block);
        modulation.load(row = row_of(a.rows, n), false);
        sums.start_row(a.width);
      }
      backward_token<Tx, Ty, Tout, Law>(a, n, modulation, sums, xhat, dxhat);
    }
    if (row >= 0) sums.flush_row(a, row, block);
    sums.flush_block(a, block);
  }
  if (writes && a.stream) stream_fence();
}

template <class Run>
void by_type(const GateResidualNormModulate& a, Run run) {
  auto by_law = [&](auto x, auto y, auto out) {
    if (a.law != 0) run(x, y, out, true_type{});
    else run(x, y, out, false_type{});
  };
  auto by_out = [&](auto half) {
    if (a.out_type == DType::f32) by_law(float{}, half, float{});
    else by_law(float{}, half, half);
  };
  if (a.x.type == DType::bf16) by_law(bf16{}, bf16{}, bf16{});
  else if (a.x.type == DType::f16) by_law(f16{}, f16{}, f16{});
  else if (a.y_type == DType::bf16) by_out(bf16{});
  else if (a.y_type == DType::f16) by_out(f16{});
  else by_law(float{}, float{}, float{});
}

}  // namespace

void gate_residual_norm_modulate_fwd(const GateResidualNormModulateFwd& a, int64_t begin,
                                     int64_t end) {
  by_type(a, [&](auto x, auto y, auto out, auto law) {
    forward<decltype(x), decltype(y), decltype(out), decltype(law)::value>(a, begin, end);
  });
}

void gate_residual_norm_modulate_bwd(const GateResidualNormModulateBwd& a, int64_t begin,
                                     int64_t end) {
  by_type(a, [&](auto x, auto y, auto out, auto law) {
    backward<decltype(x), decltype(y), decltype(out), decltype(law)::value>(a, begin, end);
  });
}

void gate_residual_norm_modulate_bwd_finish(const GateResidualNormModulateBwd& a, int64_t begin,
                                            int64_t end) {
  finish_sums({&a.dweight, &a.dbias}, {&a.dgate[0], &a.dgate[1], &a.dshift, &a.dscale}, a.rows,
              a.tokens, a.width, begin, end);
}

}  // namespace sora::SORA_ISA
