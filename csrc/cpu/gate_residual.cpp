// CPU binding of gate_residual: stable-ABI tensors in, row kernels on torch's thread pool.
#include "gate_residual.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

// What forward and backward share. `keep` owns converted vectors for the time of the call.
void fill(GateResidual& a, const Tensor& x, const Optional& gate, const Optional& gate_table,
          const Optional& weight, bool tanh, int64_t norm, int64_t law,
          std::vector<std::vector<float>>& keep) {
  keep.reserve(2);
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "sora_kernels: norm: expected 0, 1 or 2, got ", norm);
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.x_type = dtype_of(x);
  a.gate = matrix_of(gate, a.width, "gate");
  a.gate_table = vector_of(gate_table, a.width, "gate_table", keep);
  a.weight = vector_of(weight, a.width, "weight", keep);
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
  std::vector<std::vector<float>> keep;
  fill(a, x, gate, gate_table, weight, tanh, norm, law, keep);
  a.x = tokens_of(x, "x");
  a.y = tokens_of(y, "y");
  check_branch(x, a.y, y.size(2), "y");
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
  a.eps = static_cast<float>(eps);

  Tensor out = empty(x, {x.size(0), x.size(1), a.width}, x.scalar_type());
  Tensor mean = empty(x, {norm == 2 ? a.tokens : 0}, ScalarType::Float);
  Tensor rstd = empty(x, {norm != 0 ? a.tokens : 0}, ScalarType::Float);
  a.out = data(out);
  a.mean = norm == 2 ? data<float>(mean) : nullptr;
  a.rstd = data<float>(rstd);
  a.stream = static_cast<int64_t>(out.numel() * out.element_size()) >= kStreamBytes;
  torch::stable::parallel_for(0, a.tokens, 1 + 16384 / (a.width + 1), [&](int64_t b, int64_t e) {
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
  std::vector<std::vector<float>> keep;
  fill(a, dout, gate, gate_table, weight, tanh, norm, law, keep);
  a.dout = tokens_of(dout, "dout");
  if (y) a.y = tokens_of(*y, "y");
  a.y.type = dtype_of(y_dtype);
  check_branch(dout, a.y, y ? y->size(2) : a.width, "y");
  a.rows = rows_of(index, order, offsets, tokens_per_row);
  a.mean = norm == 2 ? data<float>(mean) : nullptr;
  a.rstd = data<float>(rstd);
  const bool wants_gate = (needs & 2) && gate;
  const bool wants_weight = (needs & 4) && weight;
  STD_TORCH_CHECK(y || (norm == 0 && !wants_gate),
                  "sora_kernels: y: expected a tensor, got None");
  STD_TORCH_CHECK(gate || norm != 0, "sora_kernels: gate: expected a tensor without a norm");

  auto none = [&] { return empty(dout, {0}, ScalarType::Float); };  // results must not alias
  Tensor dy = none(), dgate = none(), dweight = none();
  Tensor gate_partial = none(), weight_partial = none();
  const int64_t blocks = (a.tokens + kGateBlock - 1) / kGateBlock;
  const bool spans = index || tokens_per_row != 1;
  if (needs & 1) {
    dy = empty(dout, {dout.size(0), dout.size(1), a.width}, y_dtype);
    a.dy = data(dy);
    a.stream = static_cast<int64_t>(dy.numel() * dy.element_size()) >= kStreamBytes;
  }
  if (wants_gate) {
    // A gradient that is summed further, over rows (tables), stays fp32.
    dgate = empty(dout, {gate->size(0), a.width},
                  gate_table ? ScalarType::Float : gate->scalar_type());
    if (spans) gate_partial = empty(dout, {blocks, 2, a.width}, ScalarType::Float);
    a.dgate = {data(dgate), dtype_of(dgate), data<float>(gate_partial)};
  }
  if (wants_weight) {
    dweight = empty(dout, {a.width}, ScalarType::Float);
    weight_partial = empty(dout, {blocks, a.width}, ScalarType::Float);
    a.dweight = data<float>(dweight);
    a.dweight_partial = data<float>(weight_partial);
  }
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL(gate_residual_bwd, a, b, e);
  });
  const int64_t chunks = (a.width + kGateColumns - 1) / kGateColumns;
  const int64_t first = wants_weight ? 0 : chunks;
  const int64_t last = chunks * (1 + (wants_gate && spans ? gate->size(0) : 0));
  if (first < last) {
    torch::stable::parallel_for(first, last, 16, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL(gate_residual_bwd_finish, a, b, e);
    });
  }
  return {dy, dgate, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("gate_residual_fwd", TORCH_BOX(&forward));
  m.impl("gate_residual_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
