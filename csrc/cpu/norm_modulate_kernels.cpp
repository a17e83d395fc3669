// Row kernels of norm_modulate. Compiled once per instruction set; no torch headers.
#include "norm_modulate.h"

#include <cstdlib>

#include "grouped_sum.h"
#include "modulation.h"
#include "scratch.h"

namespace sora::SORA_ISA {
namespace {

// 1 + scale and shift of one row, tables added, as fp32 rows; null where there is none.
template <class T, bool Law>
class Modulation {
 public:
  const float* one_plus[kMaxOutputs] = {};
  const float* shift[kMaxOutputs] = {};
  static constexpr int kRows = 2 * kMaxOutputs;

  Modulation(const NormModulate& args, Scratch& scratch) : a_(args) {
    for (float*& row : memory_) row = scratch.row();
  }

  void load(int64_t row, bool with_shift) {
    const Round<T, Law> round{a_.law};
    for (int o = 0; o < a_.outputs; ++o) {
      if (a_.scale[o].data)
        one_plus[o] = one_plus_row(a_.scale[o], a_.scale_table, row, a_.width, round, memory_[o]);
      if (a_.shift[o].data && with_shift)
        shift[o] = modulation_row(a_.shift[o], a_.shift_table, row, a_.width, round,
                                  memory_[kMaxOutputs + o]);
    }
  }

 private:
  const NormModulate& a_;
  float* memory_[kRows];
};

template <class Tin, class Tout, bool Law>
void forward(const NormModulateFwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 1 + Modulation<Tout, Law>::kRows);
  const Round<Tout, Law> round{a.law};
  Modulation<Tout, Law> modulation(a, scratch);
  float* row = scratch.row();
  const float inverse = 1.0f / static_cast<float>(a.width);
  int64_t loaded = -1;
  for (int64_t n = begin; n < end; ++n) {
    const Tin* x = token_row<Tin>(a.x, n);
    float mean = 0.0f;
    float square;
    if (!a.mean) {
      square = sum_row(a.width, [&](int64_t d, auto io) {
        Vec v = io.get(x + d);
        io.put(row + d, v);
        return v * v;
      });
    } else {
      mean = inverse * sum_row(a.width, [&](int64_t d, auto io) {
        Vec v = io.get(x + d);
        io.put(row + d, v);
        return v;
      });
      square = sum_row(a.width, [&](int64_t d, auto io) {
        Vec v = io.get(row + d) - splat(mean);
        return v * v;
      });
    }
    const float rstd = 1.0f / std::sqrt(square * inverse + a.eps);
    if (a.mean) a.mean[n] = mean;
    a.rstd[n] = rstd;
    const int64_t wanted = row_of(a.rows, n);
    if (wanted != loaded) modulation.load(loaded = wanted, true);
    const Vec vmean = splat(mean), vrstd = splat(rstd);
    for (int o = 0; o < a.outputs; ++o) {
      Tout* y = static_cast<Tout*>(a.y[o]) + n * a.width;
      const float* one_plus = modulation.one_plus[o];
      const float* shift = modulation.shift[o];
      write_row(y, a.width, a.stream, [&](int64_t d, auto io) {
        Vec v = round((io.get(row + d) - vmean) * vrstd, kXhat);
        if (a.weight) v = v * io.get(a.weight + d);
        if (a.bias) v = v + io.get(a.bias + d);
        v = round(v, kAffine);
        if (one_plus) v = round(v * io.get(one_plus + d), kProduct);
        if (shift) v = v + io.get(shift + d);
        return v;  // the store is the rounding of the sum
      });
    }
  }
  if (a.stream) stream_fence();
}

// Blocks [begin, end) of kBlockTokens sorted tokens each.
template <class Tin, class Tout, bool Law>
void backward(const NormModulateBwd& a, int64_t begin, int64_t end) {
  Scratch scratch(a.width, 4 + Modulation<Tout, Law>::kRows + 2 * kMaxOutputs);
  const Round<Tout, Law> round{a.law};
  Modulation<Tout, Law> modulation(a, scratch);
  const int64_t width = a.width;
  float* xhat = scratch.row();
  float* dxhat = scratch.row();
  float* dweight = a.dweight.result ? scratch.row() : nullptr;
  float* dbias = a.dbias.result ? scratch.row() : nullptr;
  float* dshift[kMaxOutputs] = {};
  float* dscale[kMaxOutputs] = {};
  for (int o = 0; o < a.outputs; ++o) {
    if (a.dshift[o].result) dshift[o] = scratch.row();
    if (a.dscale[o].result) dscale[o] = scratch.row();
  }
  auto clear = [&](float* p) { if (p) std::memset(p, 0, width * sizeof(float)); };
  const float inverse = 1.0f / static_cast<float>(width);

  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockTokens;
    const int64_t stop = start + kBlockTokens < a.tokens ? start + kBlockTokens : a.tokens;
    int64_t row = -1;
    auto flush = [&] {
      for (int o = 0; row >= 0 && o < a.outputs; ++o) {
        if (dshift[o]) flush_sum(a.dshift[o], a.rows, row, block, a.tokens, width, dshift[o]);
        if (dscale[o]) flush_sum(a.dscale[o], a.rows, row, block, a.tokens, width, dscale[o]);
      }
    };
    clear(dweight);
    clear(dbias);
    for (int64_t position = start; position < stop; ++position) {
      const int64_t n = token_at(a.rows, position);
      if (row_of(a.rows, n) != row) {
        flush();
        row = row_of(a.rows, n);
        modulation.load(row, false);
        for (int o = 0; o < a.outputs; ++o) clear(dshift[o]), clear(dscale[o]);
      }
      const Tin* x = token_row<Tin>(a.x, n);
      const Vec mean = splat(a.mean ? a.mean[n] : 0.0f), rstd = splat(a.rstd[n]);
      const Tout* dy[kMaxOutputs] = {};
      for (int o = 0; o < a.outputs; ++o) dy[o] = token_row<Tout>(a.dy[o], n);
      const Sums sums = sum_row2(width, [&](int64_t d, auto io) {
        const Vec exact = (io.get(x + d) - mean) * rstd;
        const Vec rounded = round(exact, kXhat);
        Vec normed = rounded;
        if (a.weight) normed = normed * io.get(a.weight + d);
        if (a.bias) normed = normed + io.get(a.bias + d);
        normed = round(normed, kAffine);
        Vec dnormed = Vec{};
        for (int o = 0; o < a.outputs; ++o) {
          const Vec g = io.get(dy[o] + d);
          if (dshift[o]) io.put(dshift[o] + d, io.get(dshift[o] + d) + g);
          if (dscale[o]) io.put(dscale[o] + d, io.get(dscale[o] + d) + g * normed);
          const float* one_plus = modulation.one_plus[o];
          dnormed = dnormed + (one_plus ? g * io.get(one_plus + d) : g);
        }
        if (dweight) io.put(dweight + d, io.get(dweight + d) + dnormed * rounded);
        if (dbias) io.put(dbias + d, io.get(dbias + d) + dnormed);
        const Vec dhat = a.weight ? dnormed * io.get(a.weight + d) : dnormed;
        io.put(xhat + d, exact);
        io.put(dxhat + d, dhat);
        return VecPair{dhat, dhat * exact};
      });
      if (a.dx) {
        const Vec c1 = splat(a.mean ? sums.first * inverse : 0.0f);
        const Vec c2 = splat(sums.second * inverse);
        Tin* dx = static_cast<Tin*>(a.dx) + n * width;
        write_row(dx, width, a.stream, [&](int64_t d, auto io) {
          return rstd * (io.get(dxhat + d) - c1 - io.get(xhat + d) * c2);
        });
      }
    }
    flush();
    auto keep = [&](const VectorGrad& grad, const float* sum) {
      if (sum) std::memcpy(grad.partial + block * width, sum, width * sizeof(float));
    };
    keep(a.dweight, dweight);
    keep(a.dbias, dbias);
  }
  if (a.stream) stream_fence();
}

template <class Args, class Run>
void by_type(const Args& a, Run run) {
  const bool law = a.law != 0;
  auto by_law = [&](auto in, auto out) {
    if (law) run(in, out, true_type{});
    else run(in, out, false_type{});
  };
  if (a.x.type == DType::bf16) by_law(bf16{}, bf16{});
  else if (a.x.type == DType::f16) by_law(f16{}, f16{});
  else if (a.out_type == DType::bf16) by_law(float{}, bf16{});
  else if (a.out_type == DType::f16) by_law(float{}, f16{});
  else by_law(float{}, float{});
}

}  // namespace

void norm_modulate_fwd(const NormModulateFwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto in, auto out, auto law) {
    forward<decltype(in), decltype(out), decltype(law)::value>(a, begin, end);
  });
}

void norm_modulate_bwd(const NormModulateBwd& a, int64_t begin, int64_t end) {
  by_type(a, [&](auto in, auto out, auto law) {
    backward<decltype(in), decltype(out), decltype(law)::value>(a, begin, end);
  });
}

void norm_modulate_bwd_finish(const NormModulateBwd& a, int64_t begin, int64_t end) {
  finish_sums({&a.dweight, &a.dbias}, {&a.dshift[0], &a.dscale[0], &a.dshift[1], &a.dscale[1]},
              a.rows, a.tokens, a.width, begin, end);
}

}  // namespace sora::SORA_ISA
