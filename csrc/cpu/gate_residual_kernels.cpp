// Row kernels of gate_residual. Compiled once per instruction set; no torch headers.
#include "gate_residual.h"

#include <cmath>

#include "grouped_sum.h"
#include "law.h"
#include "modulation.h"
#include "scratch.h"
#include "vec.h"

namespace sora::SORA_ISA {
namespace {


// act(gate) of the current modulation row.
template <class Ty, bool Law>
class Gate {
 public:
  Gate(const GateResidual& args, Scratch& scratch, bool with_slope)
      : a_(args), value_(scratch.row()), slope_(with_slope && args.tanh ? scratch.row() : nullptr) {}

  const float* load(int64_t row) {
    const Round<Ty, Law> round{a_.law};
    if (a_.tanh) return tanh_row(a_.gate, a_.gate_table, row, a_.width, round, value_, slope_);
    return modulation_row(a_.gate, a_.gate_table, row, a_.width, round, value_);
  }
  const float* slope() const { return slope_; }

 private:
  const GateResidual& a_;
  float* value_;
  float* slope_;
};

// Mean and 1 / deviation of a branch row.
template <class Ty>
void statistics(const GateResidual& a, const Ty* y, int64_t n, float& mean, float& rstd) {
  const float inverse = 1.0f / static_cast<float>(a.width);
  mean = 0.0f;
  if (a.norm == BranchNorm::layer)
    mean = inverse * sum_row(a.width, [&](int64_t d, auto io) { return io.get(y + d); });
  const Vec centre = splat(mean);
  const float square = sum_row(a.width, [&](int64_t d, auto io) {
    const Vec v = io.get(y + d) - centre;
    return v * v;
  });
  rstd = 1.0f / std::sqrt(square * inverse + a.eps);
  if (a.mean) a.mean[n] = mean;
  a.rstd[n] = rstd;
}

template <class Tx, class Ty, bool Law>
void forward(const GateResidualFwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 1);
  Gate<Ty, Law> gates(a, scratch, false);
  const Round<Ty, Law> round{a.law};
  const int64_t width = a.width;
  const float* weight = a.weight;
  const float* gate = nullptr;
  int64_t row = -1;
  for (int64_t n = begin; n < end; ++n) {
    const Tx* x = token_row<Tx>(a.x, n);
    const Ty* y = token_row<Ty>(a.y, n);
    Tx* out = static_cast<Tx*>(a.out) + n * width;
    if (a.gate.data && row_of(a.rows, n) != row) gate = gates.load(row = row_of(a.rows, n));
    if (a.norm != BranchNorm::none) {
      float mean, rstd;
      statistics(a, y, n, mean, rstd);
      const Vec vmean = splat(mean), vrstd = splat(rstd);
      write_row(out, width, a.stream, [&](int64_t d, auto io) {
        Vec v = round((io.get(y + d) - vmean) * vrstd, kXhat);
        if (weight) v = v * io.get(weight + d);
        v = round(v, kAffine);
        if (gate) v = round(v * io.get(gate + d), kGated);
        return io.get(x + d) + v;
      });
    } else if (gate) {
      write_row(out, width, a.stream, [&](int64_t d, auto io) {
        return io.get(x + d) + round(io.get(gate + d) * io.get(y + d), kGated);
      });
    } else {
      write_row(out, width, a.stream,
                [&](int64_t d, auto io) { return io.get(x + d) + io.get(y + d); });
    }
  }
  if (a.stream) stream_fence();
}

// One token without a norm: dy = gate * dout, dgate += dout * y.
template <class Tx, class Ty>
void plain_token(const GateResidualBwd& a, int64_t n, const float* gate, float* dgate) {
  const Tx* dout = token_row<Tx>(a.dout, n);
  const Ty* y = a.y.data ? token_row<Ty>(a.y, n) : nullptr;
  Ty* dy = a.dy ? static_cast<Ty*>(a.dy) + n * a.width : nullptr;
  auto accumulate = [&](int64_t d, Vec g, auto io) {
    io.put(dgate + d, io.get(dgate + d) + g * io.get(y + d));
  };
  if (!dy) {
    for_row(a.width, [&](int64_t d, auto io) { accumulate(d, io.get(dout + d), io); });
  } else if (dgate) {
    write_row(dy, a.width, a.stream, [&](int64_t d, auto io) {
      const Vec g = io.get(dout + d);
      accumulate(d, g, io);
      return g * io.get(gate + d);
    });
  } else {
    write_row(dy, a.width, a.stream,
              [&](int64_t d, auto io) { return io.get(dout + d) * io.get(gate + d); });
  }
}

// One token with a norm. For b = norm(y) * weight and h = dout * gate * weight: dgate += dout * b,
// dweight += dout * gate * xhat, dy = rstd * (h - mean(h) - xhat * mean(h * xhat)); RMS: no mean(h).
template <class Tx, class Ty, bool Law>
void normed_token(const GateResidualBwd& a, int64_t n, const float* gate, float* dgate,
                  float* dweight) {
  const Round<Ty, Law> round{a.law};
  const Tx* dout = token_row<Tx>(a.dout, n);
  const Ty* y = token_row<Ty>(a.y, n);
  const float* weight = a.weight;
  const Vec mean = splat(a.mean ? a.mean[n] : 0.0f), rstd = splat(a.rstd[n]);
  auto dhat = [&](int64_t d, auto io) {
    Vec g = io.get(dout + d);
    if (gate) g = g * io.get(gate + d);
    return weight ? g * io.get(weight + d) : g;
  };
  const Sums sums = sum_row2(a.width, [&](int64_t d, auto io) {
    const Vec exact = (io.get(y + d) - mean) * rstd;
    const Vec g = io.get(dout + d);
    if (dgate || dweight) {
      const Vec rounded = round(exact, kXhat);
      const Vec branch = round(weight ? rounded * io.get(weight + d) : rounded, kAffine);
      if (dgate) io.put(dgate + d, io.get(dgate + d) + g * branch);
      if (dweight) {
        const Vec gated = gate ? g * io.get(gate + d) : g;
        io.put(dweight + d, io.get(dweight + d) + gated * rounded);
      }
    }
    const Vec h = dhat(d, io);
    return VecPair{h, h * exact};
  });
  if (!a.dy) return;
  const float inverse = 1.0f / static_cast<float>(a.width);
  const Vec c1 = splat(a.norm == BranchNorm::layer ? sums.first * inverse : 0.0f);
  const Vec c2 = splat(sums.second * inverse);
  write_row(static_cast<Ty*>(a.dy) + n * a.width, a.width, a.stream, [&](int64_t d, auto io) {
    const Vec xhat = (io.get(y + d) - mean) * rstd;
    return rstd * (dhat(d, io) - c1 - xhat * c2);
  });
}

// Blocks [begin, end) of kBlockTokens sorted tokens each.
template <class Tx, class Ty, bool Law>
void backward(const GateResidualBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 4);
  Gate<Ty, Law> gates(a, scratch, a.dgate.result != nullptr);
  const int64_t width = a.width;
  float* dgate = a.dgate.result ? scratch.row() : nullptr;
  float* dweight = a.dweight.result ? scratch.row() : nullptr;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockTokens;
    const int64_t stop = start + kBlockTokens < a.tokens ? start + kBlockTokens : a.tokens;
    int64_t row = -1;
    const float* gate = nullptr;
    auto flush = [&] {
      if (row < 0 || !dgate) return;
      if (const float* slope = gates.slope())
        for_row(width, [&](int64_t d, auto io) {
          io.put(dgate + d, io.get(dgate + d) * io.get(slope + d));
        });
      flush_sum(a.dgate, a.rows, row, block, a.tokens, width, dgate);
    };
    if (dweight) std::memset(dweight, 0, width * sizeof(float));
    for (int64_t position = start; position < stop; ++position) {
      const int64_t n = token_at(a.rows, position);
      if (a.gate.data && row_of(a.rows, n) != row) {
        flush();
        gate = gates.load(row = row_of(a.rows, n));
        if (dgate) std::memset(dgate, 0, width * sizeof(float));
      }
      if (a.norm == BranchNorm::none) plain_token<Tx, Ty>(a, n, gate, dgate);
      else normed_token<Tx, Ty, Law>(a, n, gate, dgate, dweight);
    }
    flush();
    if (dweight) std::memcpy(a.dweight.partial + block * width, dweight, width * sizeof(float));
  }
  if (a.stream) stream_fence();
}

template <class Run>
void by_type(const GateResidual& a, Run run) {
  auto by_law = [&](auto x, auto y) {
    if (a.law != 0) run(x, y, true_type{});
    else run(x, y, false_type{});
  };
  if (a.x_type == DType::bf16) by_law(bf16{}, bf16{});
  else if (a.x_type == DType::f16) by_law(f16{}, f16{});
  else if (a.y.type == DType::bf16) by_law(float{}, bf16{});
  else if (a.y.type == DType::f16) by_law(float{}, f16{});
  else by_law(float{}, float{});
}

}  // namespace

void gate_residual_fwd(const GateResidualFwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto x, auto y, auto law) {
    forward<decltype(x), decltype(y), decltype(law)::value>(a, begin, end);
  });
}

void gate_residual_bwd(const GateResidualBwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto x, auto y, auto law) {
    backward<decltype(x), decltype(y), decltype(law)::value>(a, begin, end);
  });
}

void gate_residual_bwd_finish(const GateResidualBwd& a, int64_t begin, int64_t end) {
  finish_sums({&a.dweight}, {&a.dgate}, a.rows, a.tokens, a.width, begin, end);
}

}  // namespace sora::SORA_ISA
