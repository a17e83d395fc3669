// CPU binding of gate_residual: stable-ABI tensors in, row kernels on torch's thread pool.
#include "gate_residual.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

// What forward and backward share.
void fill(Cpu& device, GateResidual& a, const Tensor& x, const Optional& gate, const Optional& gate_table,
          const Optional& weight, bool tanh, int64_t norm, int64_t law) {
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "sora_kernels: norm: expected 0, 1 or 2, got ", norm);
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.x_type = dtype_of(x);
  a.gate = matrix_of(gate, a.width, "gate");
  a.gate_table = device.vector(gate_table, a.width, "gate_table");
  a.weight = device.vector(weight, a.width, "weight");
  a.tanh = tanh;
  a.norm = static_cast<BranchNorm>(norm);
  a.law = static_cast<int>(law);
}

void check_branch(const Tensor& x, const Tokens& y, int64_t width, const char* name) {
  STD_TORCH_CHECK(width == x.size(2) && (dtype_of(x) == y.type || dtype_of(x) == DType::f32),
                  "sora_kernels: ", name, ": expected width ", x.size(2),
                  " and the dtype of x, or a half precision beside float32");
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor y, Optional gate, Optional gate_table,
                                           Optional weight, Optional index, int64_t tokens_per_row,
                                           bool tanh, int64_t norm, double eps, int64_t law) {
  GateResidualFwd a{};
  Cpu device(x);
  fill(device, a, x, gate, gate_table, weight, tanh, norm, law);
  a.x = tokens_of(x, "x");
  a.y = tokens_of(y, "y");
  check_branch(x, a.y, y.size(2), "y");
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);

  Tensor out = device.empty(shape_of(x), x.scalar_type());
  Tensor mean = device.empty({norm == 2 ? a.tokens : 0}, ScalarType::Float);
  Tensor rstd = device.empty({norm != 0 ? a.tokens : 0}, ScalarType::Float);
  a.out = data(out);
  a.mean = norm == 2 ? data<float>(mean) : nullptr;
  a.rstd = data<float>(rstd);
  a.stream = past_cache(out);
  torch::stable::parallel_for(0, a.tokens, token_grain(a.width), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL(gate_residual_fwd, a, b, e);
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, Optional y, Tensor mean, Tensor rstd,
                                            Optional gate, Optional gate_table, Optional weight,
                                            Optional index, Optional order, Optional offsets,
                                            int64_t tokens_per_row, bool tanh, int64_t norm,
                                            int64_t law, ScalarType y_dtype, int64_t needs) {
  GateResidualBwd a{};
  Cpu device(dout);
  fill(device, a, dout, gate, gate_table, weight, tanh, norm, law);
  a.dout = tokens_of(dout, "dout");
  if (y) a.y = tokens_of(*y, "y");
  a.y.type = dtype_of(y_dtype);
  check_branch(dout, a.y, y ? y->size(2) : a.width, "y");
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  a.mean = norm == 2 ? data<float>(mean) : nullptr;
  a.rstd = data<float>(rstd);
  STD_TORCH_CHECK(y || (norm == 0 && !(needs & 2 && gate)),
                  "sora_kernels: y: expected a tensor, got None");
  STD_TORCH_CHECK(gate || norm != 0, "sora_kernels: gate: expected a tensor without a norm");

  Gradients grads(device, a.tokens, a.width, a.rows, !index && tokens_per_row == 1);
  Tensor dy = grads.tokens(needs & 1, dout, y_dtype, a.dy);
  Tensor dgate = grads.modulation(needs & 2, gate, gate_table.has_value(), a.dgate);
  Tensor dweight = grads.vector(needs & 4, weight, a.dweight);
  a.stream = a.dy && past_cache(dy);
  torch::stable::parallel_for(0, blocks_of(a.tokens), 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL(gate_residual_bwd, a, b, e);
  });
  grads.finish([&](int64_t b, int64_t e) { SORA_CALL_KERNEL(gate_residual_bwd_finish, a, b, e); });
  return {dy, dgate, dweight};
}

}  // namespace

SORA_CPU_OP(gate_residual, forward, backward)

}  // namespace sora
