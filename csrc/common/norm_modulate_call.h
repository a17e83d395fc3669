// The raw ops of norm_modulate for any Device that runs its kernels.
#pragma once
#include "norm_call.h"

namespace sora {

template <class Device, class Args>
void fill(Device& device, Args& a, const Tensor& x, const NormParameters& p, const Optional& shift,
          const Optional& scale, const Optional& shift2, const Optional& scale2, DType out_type,
          int64_t law) {
  fill_norm(device, a, x, p, out_type, law);
  a.shift[0] = matrix_of(shift, a.width, "shift");
  a.scale[0] = matrix_of(scale, a.width, "scale");
  a.shift[1] = matrix_of(shift2, a.width, "shift2");
  a.scale[1] = matrix_of(scale2, a.width, "scale2");
  a.outputs = shift2 || scale2 ? 2 : 1;
  STD_TORCH_CHECK(a.x.type == DType::f32 || a.x.type == a.out_type,
                  "sora_kernels: out_dtype: expected that of x, or a float32 x");
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_modulate_forward(
    Tensor x, Optional weight, Optional bias, Optional shift, Optional scale, Optional shift_table,
    Optional scale_table, Optional shift2, Optional scale2, Optional index, int64_t tokens_per_row,
    double eps, bool rms, int64_t law, ScalarType out_dtype) {
  Device device(x);
  typename Device::Forward a{};
  fill(device, a, x, {weight, bias, shift_table, scale_table}, shift, scale, shift2, scale2,
       dtype_of(out_dtype), law);
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);

  Tensor y = device.empty(shape_of(x), out_dtype);
  Tensor y2 = device.empty(a.outputs == 2 ? shape_of(x) : std::vector<int64_t>{0}, out_dtype);
  a.y[0] = data(y);
  a.y[1] = data(y2);
  Statistics s = new_statistics(device, a, rms);
  device.forward(a);
  return {y, y2, s.mean, s.rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_backward(
    Tensor dy, Optional dy2, Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias,
    Optional shift, Optional scale, Optional shift_table, Optional scale_table, Optional shift2,
    Optional scale2, Optional index, Optional order, Optional offsets, int64_t tokens_per_row,
    bool rms, int64_t law, int64_t needs) {
  Device device(x);
  typename Device::Backward a{};
  fill(device, a, x, {weight, bias, shift_table, scale_table}, shift, scale, shift2, scale2,
       dtype_of(dy), law);
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  a.dy[0] = tokens_of(dy, "dy");
  if (dy2) a.dy[1] = tokens_of(*dy2, "dy2");
  Statistics{mean, rstd}.attach(a, rms);

  typename Device::Gradients grads(device, a.tokens, a.width, a.rows,
                                   !index && tokens_per_row == 1);
  Tensor dx = grads.tokens(needs & 1, x, x.scalar_type(), a.dx);
  Tensor dweight = grads.vector(needs & 2, weight, a.dweight);
  Tensor dbias = grads.vector(needs & 4, bias, a.dbias);
  Tensor dshift = grads.modulation(needs & 8, shift, shift_table.has_value(), a.dshift[0]);
  Tensor dscale = grads.modulation(needs & 16, scale, scale_table.has_value(), a.dscale[0]);
  Tensor dshift2 = grads.modulation(needs & 32, shift2, false, a.dshift[1]);
  Tensor dscale2 = grads.modulation(needs & 64, scale2, false, a.dscale[1]);
  device.backward(a, grads);
  return {dx, dweight, dbias, dshift, dscale, dshift2, dscale2};
}

}  // namespace sora
