// CUDA binding of gate_residual_norm_modulate.
#include "gate_residual_norm_modulate.h"

#include <tuple>

#include "bind.h"

namespace sora::cuda {
namespace {

using Args = GateResidualNormModulate;

struct Modulations {
  const Optional &gate, &gate2, &weight, &bias, &shift, &scale;
  const Optional &gate_table, &shift_table, &scale_table;
};

// What forward and backward share.
void fill(Args& a, const Tensor& x, const Modulations& m, int64_t law, ScalarType y_type,
          ScalarType out_type) {
  a.x = tokens_of(x, "x");
  a.width = width_of(x);
  a.tokens = x.size(0) * x.size(1);
  a.gate[0] = matrix_of(m.gate, a.width, "gate");
  a.gate[1] = matrix_of(m.gate2, a.width, "gate2");
  a.shift = matrix_of(m.shift, a.width, "shift");
  a.scale = matrix_of(m.scale, a.width, "scale");
  a.weight = vector_of(m.weight, a.width, "weight");
  a.bias = vector_of(m.bias, a.width, "bias");
  a.gate_table[0] = vector_of(m.gate_table, a.width, "gate_table");
  a.shift_table = vector_of(m.shift_table, a.width, "shift_table");
  a.scale_table = vector_of(m.scale_table, a.width, "scale_table");
  a.law = static_cast<int>(law);
  a.y_type = dtype_of(y_type);
  a.out_type = dtype_of(out_type);
  const bool wide = a.x.type == DType::f32;
  STD_TORCH_CHECK(wide || (a.y_type == a.x.type && a.out_type == a.x.type),
                  "sora_kernels: x: expected float32 beside branches of another dtype");
  STD_TORCH_CHECK(a.out_type == a.x.type || a.out_type == a.y_type,
                  "sora_kernels: out_dtype: expected the dtype of x or y");
}

void set_branch(Args& a, int b, const Optional& y, const char* name) {
  if (!y) return;
  a.y[b] = tokens_of(*y, name);
  STD_TORCH_CHECK(a.y[b].type == a.y_type && y->size(2) == a.width &&
                      y->size(0) * y->size(1) == a.tokens,
                  "sora_kernels: ", name, ": expected the shape of x and one dtype");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, Tensor y, Optional y2, Optional gate, Optional gate2, Optional weight, Optional bias,
    Optional shift, Optional scale, Optional gate_table, Optional shift_table,
    Optional scale_table, Optional index, int64_t tokens_per_row, double eps, bool rms, int64_t law,
    ScalarType out_dtype) {
  const OnDevice device(x);
  GateResidualNormModulateFwd a{};
  fill(a, x, {gate, gate2, weight, bias, shift, scale, gate_table, shift_table, scale_table}, law,
       y.scalar_type(), out_dtype);
  set_branch(a, 0, y, "y");
  set_branch(a, 1, y2, "y2");
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);

  const std::vector<int64_t> shape{x.size(0), x.size(1), x.size(2)};
  Tensor residual = empty(x, shape, x.scalar_type());
  Tensor normed = empty(x, shape, out_dtype);
  Tensor mean = empty(x, {rms ? 0 : a.tokens}, ScalarType::Float);
  Tensor rstd = empty(x, {a.tokens}, ScalarType::Float);
  a.residual = data(residual);
  a.normed = data(normed);
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);
  gate_residual_norm_modulate_fwd(a, device.stream());
  return {residual, normed, mean, rstd};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results backward(Optional dresidual, Tensor dnormed, Tensor x, Optional y, Optional y2, Tensor mean,
                 Tensor rstd, Optional gate, Optional gate2, Optional weight, Optional bias,
                 Optional shift, Optional scale, Optional gate_table, Optional shift_table,
                 Optional scale_table, Optional index, Optional order, Optional offsets,
                 int64_t tokens_per_row, bool rms, int64_t law, ScalarType y_dtype, int64_t needs) {
  const OnDevice device(x);
  GateResidualNormModulateBwd a{};
  fill(a, x, {gate, gate2, weight, bias, shift, scale, gate_table, shift_table, scale_table}, law,
       y_dtype, dnormed.scalar_type());
  set_branch(a, 0, y, "y");
  set_branch(a, 1, y2, "y2");
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  if (dresidual) {
    a.dresidual = tokens_of(*dresidual, "dresidual");
    STD_TORCH_CHECK(a.dresidual.type == a.x.type, "sora_kernels: dresidual: expected dtype of x");
  }
  a.dnormed = tokens_of(dnormed, "dnormed");
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);

  Gradients gradients(x, a.tokens, a.width, a.rows, !index && tokens_per_row == 1);
  auto wanted = [&](int bit) { return (needs >> bit & 1) != 0; };
  auto tokens = [&](int bit, ScalarType type, void*& pointer) {
    if (!wanted(bit)) return gradients.none();
    Tensor grad = empty(x, {x.size(0), x.size(1), x.size(2)}, type);
    pointer = data(grad);
    return grad;
  };
  Tensor dx = tokens(0, x.scalar_type(), a.dx);
  Tensor dy = tokens(1, y_dtype, a.dy[0]);
  Tensor dy2 = tokens(2, y_dtype, a.dy[1]);
  Tensor dgate = gradients.modulation(wanted(3), gate, gate_table.has_value(), a.dgate[0]);
  Tensor dgate2 = gradients.modulation(wanted(4), gate2, false, a.dgate[1]);
  Tensor dweight = gradients.vector(wanted(5), weight, a.dweight);
  Tensor dbias = gradients.vector(wanted(6), bias, a.dbias);
  Tensor dshift = gradients.modulation(wanted(7), shift, shift_table.has_value(), a.dshift);
  Tensor dscale = gradients.modulation(wanted(8), scale, scale_table.has_value(), a.dscale);
  STD_TORCH_CHECK((y || !a.dgate[0].grad.result) && (y2 || !a.dgate[1].grad.result),
                  "sora_kernels: y: expected a tensor for the gradient of its gate, got None");
  const bool whole = !(needs & 31) || gate_residual_norm_modulate_bwd_holds_row(a);
  Tensor means = empty(x, {whole ? 0 : a.tokens, 2}, ScalarType::Float);
  a.means = whole ? nullptr : data<float>(means);
  gate_residual_norm_modulate_bwd(a, device.stream());
  return {dx, dy, dy2, dgate, dgate2, dweight, dbias, dshift, dscale};
}

}  // namespace

SORA_CUDA_LIBRARY(m) {
  m.impl("gate_residual_norm_modulate_fwd_cuda", TORCH_BOX(&forward));
  m.impl("gate_residual_norm_modulate_bwd_cuda", TORCH_BOX(&backward));
}

}  // namespace sora::cuda
