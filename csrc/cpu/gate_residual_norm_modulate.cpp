// CPU binding of gate_residual_norm_modulate: stable-ABI tensors in, row kernels on torch's pool.
#include "gate_residual_norm_modulate.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

using Args = GateResidualNormModulate;

struct Modulations {
  const Optional &gate, &gate2, &weight, &bias, &shift, &scale;
  const Optional &gate_table, &shift_table, &scale_table;
};

// What forward and backward share. `keep` owns converted vectors for the time of the call.
void fill(Args& a, const Tensor& x, const Modulations& m, int64_t law, ScalarType y_type,
          ScalarType out_type, std::vector<std::vector<float>>& keep) {
  keep.reserve(5);
  a.x = tokens_of(x, "x");
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.gate[0] = matrix_of(m.gate, a.width, "gate");
  a.gate[1] = matrix_of(m.gate2, a.width, "gate2");
  a.shift = matrix_of(m.shift, a.width, "shift");
  a.scale = matrix_of(m.scale, a.width, "scale");
  a.weight = vector_of(m.weight, a.width, "weight", keep);
  a.bias = vector_of(m.bias, a.width, "bias", keep);
  a.gate_table = vector_of(m.gate_table, a.width, "gate_table", keep);
  a.shift_table = vector_of(m.shift_table, a.width, "shift_table", keep);
  a.scale_table = vector_of(m.scale_table, a.width, "scale_table", keep);
  a.law = static_cast<int>(law);
  a.y_type = dtype_of(y_type);
  a.out_type = dtype_of(out_type);
  a.branches = kMaxBranches;
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
  GateResidualNormModulateFwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, {gate, gate2, weight, bias, shift, scale, gate_table, shift_table, scale_table}, law,
       y.scalar_type(), out_dtype, keep);
  set_branch(a, 0, y, "y");
  set_branch(a, 1, y2, "y2");
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);
  a.rms = rms;

  const std::vector<int64_t> shape{x.size(0), x.size(1), x.size(2)};
  Tensor residual = empty(x, shape, x.scalar_type());
  Tensor normed = empty(x, shape, out_dtype);
  Tensor mean = empty(x, {rms ? 0 : a.tokens}, ScalarType::Float);
  Tensor rstd = empty(x, {a.tokens}, ScalarType::Float);
  a.residual = data(residual);
  a.normed = data(normed);
  a.mean = rms ? nullptr : data<float>(mean);
  a.rstd = data<float>(rstd);
  a.stream = static_cast<int64_t>(normed.numel() * normed.element_size()) >= kStreamBytes;
  torch::stable::parallel_for(0, a.tokens, 1 + 16384 / (a.width + 1), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL(gate_residual_norm_modulate_fwd, a, b, e);
  });
  return {residual, normed, mean, rstd};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Optional dresidual, Tensor dnormed, Tensor x, Optional y, Optional y2,
                   Tensor mean, Tensor rstd, Optional gate, Optional gate2, Optional weight,
                   Optional bias, Optional shift, Optional scale, Optional gate_table,
                   Optional shift_table, Optional scale_table, Optional index, Optional order,
                   Optional offsets, int64_t tokens_per_row, bool rms, int64_t law,
                   ScalarType y_dtype, int64_t needs) {
  GateResidualNormModulateBwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, {gate, gate2, weight, bias, shift, scale, gate_table, shift_table, scale_table}, law,
       y_dtype, dnormed.scalar_type(), keep);
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
  a.rms = rms;
  const int64_t width = a.width;
  const int64_t blocks = (a.tokens + kGrnmBlock - 1) / kGrnmBlock;
  const bool spans = index || tokens_per_row != 1;

  std::vector<Tensor> grads, partials;
  for (int i = 0; i < 9; ++i) grads.push_back(empty(x, {0}, ScalarType::Float));
  partials.reserve(6);
  auto partial = [&](std::vector<int64_t> shape) {
    partials.push_back(empty(x, shape, ScalarType::Float));
    return data<float>(partials.back());
  };
  auto tokens = [&](int bit, ScalarType type, void*& pointer) {
    if (!(needs >> bit & 1)) return;
    grads[bit] = empty(x, {x.size(0), x.size(1), width}, type);
    pointer = data(grads[bit]);
    a.stream = a.stream || a.tokens * width * grads[bit].element_size() >= kStreamBytes;
  };
  // A gradient that is summed further, over rows (tables), stays fp32.
  int64_t rows = 0;
  auto modulation = [&](int bit, const Optional& of, bool table, RowGrad& grad) {
    if (!(needs >> bit & 1) || !of) return;
    grads[bit] = empty(x, {of->size(0), width}, table ? ScalarType::Float : of->scalar_type());
    grad = {data(grads[bit]), dtype_of(grads[bit]), spans ? partial({blocks, 2, width}) : nullptr};
    if (spans) rows = of->size(0);
  };
  auto vector = [&](int bit, const Optional& of, float*& grad, float*& part) {
    if (!(needs >> bit & 1) || !of) return;
    grads[bit] = empty(x, {width}, ScalarType::Float);
    grad = data<float>(grads[bit]);
    part = partial({blocks, width});
  };
  tokens(0, x.scalar_type(), a.dx);
  tokens(1, y_dtype, a.dy[0]);
  tokens(2, y_dtype, a.dy[1]);
  modulation(3, gate, gate_table.has_value(), a.dgate[0]);
  modulation(4, gate2, false, a.dgate[1]);
  vector(5, weight, a.dweight, a.dweight_partial);
  vector(6, bias, a.dbias, a.dbias_partial);
  modulation(7, shift, shift_table.has_value(), a.dshift);
  modulation(8, scale, scale_table.has_value(), a.dscale);
  STD_TORCH_CHECK((y || !a.dgate[0].result) && (y2 || !a.dgate[1].result),
                  "sora_kernels: y: expected a tensor for the gradient of its gate, got None");

  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL(gate_residual_norm_modulate_bwd, a, b, e);
  });
  const int64_t chunks = (width + kGrnmColumns - 1) / kGrnmColumns;
  const int64_t first = a.dweight || a.dbias ? 0 : chunks, last = chunks * (1 + rows);
  if (first < last) {
    torch::stable::parallel_for(first, last, 16, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL(gate_residual_norm_modulate_bwd_finish, a, b, e);
    });
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7], grads[8]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("gate_residual_norm_modulate_fwd", TORCH_BOX(&forward));
  m.impl("gate_residual_norm_modulate_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
