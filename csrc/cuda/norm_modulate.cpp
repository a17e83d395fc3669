// CUDA binding of norm_modulate.
#include "norm_modulate.h"

#include <tuple>

#include "bind.h"

namespace sora::cuda {
namespace {

struct Modulations {
  const Optional &weight, &bias, &shift, &scale, &shift_table, &scale_table, &shift2, &scale2;
};

// What forward and backward share.
void fill(NormModulate& a, const Tensor& x, const Modulations& m, DType out_type, int64_t law) {
  a.x = tokens_of(x, "x");
  a.width = width_of(x);
  a.tokens = x.size(0) * x.size(1);
  a.weight = vector_of(m.weight, a.width, "weight");
  a.bias = vector_of(m.bias, a.width, "bias");
  a.shift_table = vector_of(m.shift_table, a.width, "shift_table");
  a.scale_table = vector_of(m.scale_table, a.width, "scale_table");
  a.shift[0] = matrix_of(m.shift, a.width, "shift");
  a.scale[0] = matrix_of(m.scale, a.width, "scale");
  a.shift[1] = matrix_of(m.shift2, a.width, "shift2");
  a.scale[1] = matrix_of(m.scale2, a.width, "scale2");
  a.outputs = m.shift2 || m.scale2 ? 2 : 1;
  a.out_type = out_type;
  a.law = static_cast<int>(law);
  STD_TORCH_CHECK(a.x.type == DType::f32 || a.x.type == a.out_type,
                  "sora_kernels: out_dtype: expected that of x, or a float32 x");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, Optional weight, Optional bias, Optional shift, Optional scale, Optional shift_table,
    Optional scale_table, Optional shift2, Optional scale2, Optional index, int64_t tokens_per_row,
    double eps, bool rms, int64_t law, ScalarType out_dtype) {
  const OnDevice device(x);
  NormModulateFwd a{};
  fill(a, x, {weight, bias, shift, scale, shift_table, scale_table, shift2, scale2},
       dtype_of(out_dtype), law);
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);

  const std::vector<int64_t> shape{x.size(0), x.size(1), x.size(2)};
  Tensor y = empty(x, shape, out_dtype);
  Tensor y2 = empty(x, a.outputs == 2 ? shape : std::vector<int64_t>{0}, out_dtype);
  Tensor mean = empty(x, {rms ? 0 : a.tokens}, ScalarType::Float);
  Tensor rstd = empty(x, {a.tokens}, ScalarType::Float);
  a.y[0] = data(y);
  a.y[1] = data(y2);
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);
  norm_modulate_fwd(a, device.stream());
  return {y, y2, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Optional dy2, Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias,
    Optional shift, Optional scale, Optional shift_table, Optional scale_table, Optional shift2,
    Optional scale2, Optional index, Optional order, Optional offsets, int64_t tokens_per_row,
    bool rms, int64_t law, int64_t needs) {
  const OnDevice device(x);
  NormModulateBwd a{};
  fill(a, x, {weight, bias, shift, scale, shift_table, scale_table, shift2, scale2}, dtype_of(dy),
       law);
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  a.dy[0] = tokens_of(dy, "dy");
  if (dy2) a.dy[1] = tokens_of(*dy2, "dy2");
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);

  Gradients gradients(x, a.tokens, a.width, a.rows, !index && tokens_per_row == 1);
  Tensor dx = gradients.none();
  if (needs & 1) {
    dx = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
    a.dx = data(dx);
  }
  Tensor dweight = gradients.vector(needs & 2, weight, a.dweight);
  Tensor dbias = gradients.vector(needs & 4, bias, a.dbias);
  Tensor dshift = gradients.modulation(needs & 8, shift, shift_table.has_value(), a.dshift[0]);
  Tensor dscale = gradients.modulation(needs & 16, scale, scale_table.has_value(), a.dscale[0]);
  Tensor dshift2 = gradients.modulation(needs & 32, shift2, false, a.dshift[1]);
  Tensor dscale2 = gradients.modulation(needs & 64, scale2, false, a.dscale[1]);
  const bool whole = !a.dx || norm_modulate_bwd_holds_row(a);
  Tensor means = empty(x, {whole ? 0 : a.tokens, 2}, ScalarType::Float);
  a.means = data<float>(means);
  norm_modulate_bwd(a, device.stream());
  return {dx, dweight, dbias, dshift, dscale, dshift2, dscale2};
}

}  // namespace

SORA_CUDA_LIBRARY(m) {
  m.impl("norm_modulate_fwd_cuda", TORCH_BOX(&forward));
  m.impl("norm_modulate_bwd_cuda", TORCH_BOX(&backward));
}

}  // namespace sora::cuda
