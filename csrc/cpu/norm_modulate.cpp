// CPU binding of norm_modulate: stable-ABI tensors in, row kernels on torch's thread pool.
#include "norm_modulate.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

struct Modulations {
  const Optional &shift, &scale, &shift_table, &scale_table, &shift2, &scale2;
};

// What forward and backward share. `keep` owns converted vectors for the time of the call.
void fill(NormModulate& a, const Tensor& x, const Optional& weight, const Optional& bias,
          const Modulations& m, std::vector<std::vector<float>>& keep) {
  keep.reserve(4);
  a.x = tokens_of(x, "x");
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.weight = vector_of(weight, a.width, "weight", keep);
  a.bias = vector_of(bias, a.width, "bias", keep);
  a.shift_table = vector_of(m.shift_table, a.width, "shift_table", keep);
  a.scale_table = vector_of(m.scale_table, a.width, "scale_table", keep);
  a.shift[0] = matrix_of(m.shift, a.width, "shift");
  a.scale[0] = matrix_of(m.scale, a.width, "scale");
  a.shift[1] = matrix_of(m.shift2, a.width, "shift2");
  a.scale[1] = matrix_of(m.scale2, a.width, "scale2");
  a.outputs = m.shift2 || m.scale2 ? 2 : 1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, Optional weight, Optional bias, Optional shift, Optional scale, Optional shift_table,
    Optional scale_table, Optional shift2, Optional scale2, Optional index, int64_t tokens_per_row,
    double eps, bool rms, int64_t law, ScalarType out_dtype) {
  NormModulateFwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, weight, bias, {shift, scale, shift_table, scale_table, shift2, scale2}, keep);
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.out_type = dtype_of(out_dtype);
  a.eps = static_cast<float>(eps);
  a.rms = rms;
  a.law = static_cast<int>(law);

  const std::vector<int64_t> shape{x.size(0), x.size(1), x.size(2)};
  Tensor y = empty(x, shape, out_dtype);
  Tensor y2 = empty(x, a.outputs == 2 ? shape : std::vector<int64_t>{0}, out_dtype);
  Tensor mean = empty(x, {rms ? 0 : a.tokens}, ScalarType::Float);
  Tensor rstd = empty(x, {a.tokens}, ScalarType::Float);
  a.y[0] = data(y);
  a.y[1] = data(y2);
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);
  a.stream = static_cast<int64_t>(y.numel() * y.element_size()) >= kStreamBytes;
  torch::stable::parallel_for(0, a.tokens, 1 + 16384 / (a.width + 1), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(norm_modulate_fwd, a, b, e);
  });
  return {y, y2, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Optional dy2, Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias,
    Optional shift, Optional scale, Optional shift_table, Optional scale_table, Optional shift2,
    Optional scale2, Optional index, Optional order, Optional offsets, int64_t tokens_per_row,
    bool rms, int64_t law, int64_t needs) {
  NormModulateBwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, weight, bias, {shift, scale, shift_table, scale_table, shift2, scale2}, keep);
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  a.out_type = dtype_of(dy);
  a.dy[0] = tokens_of(dy, "dy");
  if (dy2) a.dy[1] = tokens_of(*dy2, "dy2");
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);
  a.rms = rms;
  a.law = static_cast<int>(law);
  const int64_t width = a.width;
  const int64_t blocks = (a.tokens + kNormModulateBlock - 1) / kNormModulateBlock;

  auto none = [&] { return empty(x, {0}, ScalarType::Float); };  // outputs must not alias
  Tensor dx = none(), dweight = none(), dbias = none();
  Tensor dshift[kMaxOutputs] = {none(), none()}, dscale[kMaxOutputs] = {none(), none()};
  std::vector<Tensor> partials;
  auto partial = [&](std::vector<int64_t> shape) {
    partials.push_back(empty(x, shape, ScalarType::Float));
    return data<float>(partials.back());
  };
  if (needs & 1) {
    dx = empty(x, {x.size(0), x.size(1), width}, x.scalar_type());
    a.dx = data(dx);
    a.stream = static_cast<int64_t>(dx.numel() * dx.element_size()) >= kStreamBytes;
  }
  if (needs & 2 && weight) {
    dweight = empty(x, {width}, ScalarType::Float);
    a.dweight = data<float>(dweight);
    a.dweight_partial = partial({blocks, width});
  }
  if (needs & 4 && bias) {
    dbias = empty(x, {width}, ScalarType::Float);
    a.dbias = data<float>(dbias);
    a.dbias_partial = partial({blocks, width});
  }
  // A gradient that is summed further, over rows (tables), stays fp32.
  auto modulation = [&](int bit, const Optional& of, bool table, Tensor& grad, void*& pointer,
                        float*& part, DType& type) {
    if (!(needs & bit) || !of) return;
    grad = empty(x, {of->size(0), width}, table ? ScalarType::Float : of->scalar_type());
    pointer = data(grad);
    part = partial({blocks, 2, width});
    type = dtype_of(grad);
  };
  modulation(8, shift, shift_table.has_value(), dshift[0], a.dshift[0], a.dshift_partial[0],
             a.shift_type[0]);
  modulation(16, scale, scale_table.has_value(), dscale[0], a.dscale[0], a.dscale_partial[0],
             a.scale_type[0]);
  modulation(32, shift2, false, dshift[1], a.dshift[1], a.dshift_partial[1], a.shift_type[1]);
  modulation(64, scale2, false, dscale[1], a.dscale[1], a.dscale_partial[1], a.scale_type[1]);

  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(norm_modulate_bwd, a, b, e);
  });
  int64_t rows = 0;
  for (const Optional* m : {&shift, &scale, &shift2, &scale2})
    if (*m) rows = (*m)->size(0);
  const int64_t chunks = (width + kNormModulateColumns - 1) / kNormModulateColumns;
  if (needs & ~int64_t{1}) {
    torch::stable::parallel_for(0, (1 + rows) * chunks, 16, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(norm_modulate_bwd_finish, a, b, e);
    });
  }
  return {dx, dweight, dbias, dshift[0], dscale[0], dshift[1], dscale[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("norm_modulate_fwd", TORCH_BOX(&forward));
  m.impl("norm_modulate_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
