// The raw ops of gate_residual_norm_modulate for any Device that runs its kernels.
#pragma once
#include "norm_call.h"

namespace sora {

struct GateModulations {
  const Optional &y, &y2, &gate, &gate2, &gate_table, &shift, &scale;
};

template <class Device, class Args>
void fill(Device& device, Args& a, const Tensor& x, const NormParameters& p,
          const GateModulations& m, ScalarType y_type, ScalarType out_type, int64_t law) {
  fill_norm(device, a, x, p, dtype_of(out_type), law);
  a.gate[0] = matrix_of(m.gate, a.width, "gate");
  a.gate[1] = matrix_of(m.gate2, a.width, "gate2");
  a.gate_table[0] = device.vector(m.gate_table, a.width, "gate_table");
  a.shift = matrix_of(m.shift, a.width, "shift");
  a.scale = matrix_of(m.scale, a.width, "scale");
  a.y_type = dtype_of(y_type);
  const bool wide = a.x.type == DType::f32;
  STD_TORCH_CHECK(wide || (a.y_type == a.x.type && a.out_type == a.x.type),
                  "sora_kernels: x: expected float32 beside branches of another dtype");
  STD_TORCH_CHECK(a.out_type == a.x.type || a.out_type == a.y_type,
                  "sora_kernels: out_dtype: expected the dtype of x or y");
  for (int b = 0; b < 2; ++b) {
    const Optional& y = b == 0 ? m.y : m.y2;
    if (!y) continue;
    a.y[b] = tokens_of(*y, b == 0 ? "y" : "y2");
    STD_TORCH_CHECK(a.y[b].type == a.y_type && y->size(2) == a.width &&
                        y->size(0) * y->size(1) == a.tokens,
                    "sora_kernels: y, y2: expected the shape of x and one dtype");
  }
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_forward(
    Tensor x, Tensor y, Optional y2, Optional gate, Optional gate2, Optional weight,
    Optional bias, Optional shift, Optional scale, Optional gate_table, Optional shift_table,
    Optional scale_table, Optional index, int64_t tokens_per_row, double eps, bool rms, int64_t law,
    ScalarType out_dtype) {
  Device device(x);
  typename Device::Forward a{};
  fill(device, a, x, {weight, bias, shift_table, scale_table},
       {y, y2, gate, gate2, gate_table, shift, scale}, y.scalar_type(), out_dtype, law);
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);

  Tensor residual = device.empty(shape_of(x), x.scalar_type());
  Tensor normed = device.empty(shape_of(x), out_dtype);
  a.residual = data(residual);
  a.normed = data(normed);
  Statistics s = new_statistics(device, a, rms);
  device.forward(a);
  return {residual, normed, s.mean, s.rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
gate_residual_norm_modulate_backward(
    Optional dresidual, Tensor dnormed, Tensor x, Optional y, Optional y2, Tensor mean, Tensor rstd,
    Optional gate, Optional gate2, Optional weight, Optional bias, Optional shift, Optional scale,
    Optional gate_table, Optional shift_table, Optional scale_table, Optional index, Optional order,
    Optional offsets, int64_t tokens_per_row, bool rms, int64_t law, ScalarType y_dtype,
    int64_t needs) {
  Device device(x);
  typename Device::Backward a{};
  fill(device, a, x, {weight, bias, shift_table, scale_table},
       {y, y2, gate, gate2, gate_table, shift, scale}, y_dtype, dnormed.scalar_type(), law);
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  if (dresidual) {
    a.dresidual = tokens_of(*dresidual, "dresidual");
    STD_TORCH_CHECK(a.dresidual.type == a.x.type, "sora_kernels: dresidual: expected dtype of x");
  }
  a.dnormed = tokens_of(dnormed, "dnormed");
  Statistics{mean, rstd}.attach(a, rms);

  typename Device::Gradients grads(device, a.tokens, a.width, a.rows,
                                   !index && tokens_per_row == 1);
  const auto wanted = [&](int bit) { return (needs >> bit & 1) != 0; };
  Tensor dx = grads.tokens(wanted(0), x, x.scalar_type(), a.dx);
  Tensor dy = grads.tokens(wanted(1), x, y_dtype, a.dy[0]);
  Tensor dy2 = grads.tokens(wanted(2), x, y_dtype, a.dy[1]);
  Tensor dgate = grads.modulation(wanted(3), gate, gate_table.has_value(), a.dgate[0]);
  Tensor dgate2 = grads.modulation(wanted(4), gate2, false, a.dgate[1]);
  Tensor dweight = grads.vector(wanted(5), weight, a.dweight);
  Tensor dbias = grads.vector(wanted(6), bias, a.dbias);
  Tensor dshift = grads.modulation(wanted(7), shift, shift_table.has_value(), a.dshift);
  Tensor dscale = grads.modulation(wanted(8), scale, scale_table.has_value(), a.dscale);
  STD_TORCH_CHECK((y || !dgate.numel()) && (y2 || !dgate2.numel()),
                  "sora_kernels: y: expected a tensor for the gradient of its gate, got None");
  device.backward(a, grads);
  return {dx, dy, dy2, dgate, dgate2, dweight, dbias, dshift, dscale};
}

}  // namespace sora
