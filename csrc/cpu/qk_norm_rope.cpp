// CPU binding of qk_norm_rope: stable-ABI tensors in, kernels on torch's thread pool.
#include "qk_norm_rope.h"

#include <algorithm>
#include <tuple>

#include "bind.h"

namespace sora {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// [N, H, D] or [B, L, H, D]
Heads heads_of(const Tensor& t, const char* name) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(rank == 3 || rank == 4, "sora_kernels: ", name,
                  ": expected [N, H, D] or [B, L, H, D], got ", rank, " dimensions");
  check_unit_stride(t, name);
  return {t.const_data_ptr(), std::max<int64_t>(t.size(rank - 3), 1),
          rank == 4 ? t.stride(0) : 0, t.stride(rank - 3), t.stride(rank - 2)};
}

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

struct Rope {
  const Optional &cos, &sin, &position_index;
  const std::vector<int64_t>& axes;
};

// What forward and backward share. `keep` owns converted vectors for the time of the call.
void fill(QkNormRope& a, const Tensor& q, const Tensor& k, const Optional& q_weight,
          const Optional& k_weight, const Rope& rope, int64_t norm, double eps, int64_t pairing,
          int64_t law, std::vector<std::vector<float>>& keep) {
  keep.reserve(4);
  a.width = q.size(q.dim() - 1);
  a.type = dtype_of(q);
  STD_TORCH_CHECK(k.dim() == q.dim() && k.size(k.dim() - 1) == a.width && dtype_of(k) == a.type,
                  "sora_kernels: k: expected the rank, head width and dtype of q");
  a.norm = static_cast<int>(norm);
  a.pairing = static_cast<int>(pairing);
  a.eps = static_cast<float>(eps);
  a.law = static_cast<int>(law);
  int64_t side = 0;
  for (const auto& [x, weight] : {std::tie(q, q_weight), std::tie(k, k_weight)}) {
    QkSide& out = a.side[side++];
    out.x = heads_of(x, "q, k");
    out.heads = x.size(x.dim() - 2);
    out.tokens = x.dim() == 3 ? x.size(0) : x.size(0) * x.size(1);
    const int64_t size = a.width * (a.norm == kRmsFull ? out.heads : 1);
    out.weight = vector_of(weight, size, "weight", keep);
  }
  if (!rope.cos) return;
  STD_TORCH_CHECK(rope.sin && rope.position_index && !rope.axes.empty() &&
                      rope.axes.size() <= kMaxAxes,
                  "sora_kernels: rope: expected cos, sin, position_index and 1 to 4 axes");
  int64_t pairs = 0;
  for (int64_t size : rope.axes) a.axis_end[a.axes++] = pairs += size / 2;
  const Tensor &cos = *rope.cos, &sin = *rope.sin;
  a.per_head = cos.dim() == 3;
  for (const Tensor& table : {cos, sin})
    STD_TORCH_CHECK(dtype_of(table) == DType::f32 && table.is_contiguous() &&
                        table.dim() == cos.dim() && table.size(table.dim() - 1) == pairs &&
                        2 * pairs <= a.width,
                    "sora_kernels: rope: expected contiguous fp32 tables of ", pairs, " columns");
  a.cos = static_cast<const float*>(cos.const_data_ptr());
  a.sin = static_cast<const float*>(sin.const_data_ptr());
  a.position_index = ints_of(rope.position_index, "position_index");
  a.rope_tokens = rope.position_index->size(0);
  a.num_positions = rope.position_index->size(1);
  STD_TORCH_CHECK(a.num_positions == 1 || a.num_positions == a.axes,
                  "sora_kernels: position_index: expected [N, 1] or [N, axes]");
  STD_TORCH_CHECK(a.rope_tokens > 0 || a.side[0].tokens == 0,
                  "sora_kernels: position_index: expected one row per token, got none");
}

int64_t most_tokens(const QkNormRope& a) { return std::max(a.side[0].tokens, a.side[1].tokens); }

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Optional q_weight, Optional k_weight,
                                   Optional q_bias, Optional k_bias, Optional cos, Optional sin,
                                   Optional position_index, std::vector<int64_t> axes, int64_t norm,
                                   double eps, int64_t pairing, int64_t law) {
  QkNormRope a{};
  std::vector<std::vector<float>> keep;
  fill(a, q, k, q_weight, k_weight, {cos, sin, position_index, axes}, norm, eps, pairing, law,
       keep);
  a.side[0].bias = vector_of(q_bias, a.width, "q_bias", keep);
  a.side[1].bias = vector_of(k_bias, a.width, "k_bias", keep);
  Tensor yq = empty(q, shape_of(q), q.scalar_type());
  Tensor yk = empty(k, shape_of(k), k.scalar_type());
  a.side[0].y = data(yq);
  a.side[1].y = data(yk);
  a.stream = static_cast<int64_t>((yq.numel() + yk.numel()) * yq.element_size()) >= kStreamBytes;
  const int64_t work = a.width * (a.side[0].heads + a.side[1].heads);
  torch::stable::parallel_for(0, most_tokens(a), 1 + 16384 / (work + 1), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(qk_norm_rope_fwd, a, b, e);
  });
  return {yq, yk};
}

Gradients backward(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Optional q_weight, Optional k_weight,
                   Optional cos, Optional sin, Optional position_index, std::vector<int64_t> axes,
                   int64_t norm, double eps, int64_t pairing, int64_t law, int64_t needs) {
  QkNormRope a{};
  std::vector<std::vector<float>> keep;
  fill(a, q, k, q_weight, k_weight, {cos, sin, position_index, axes}, norm, eps, pairing, law,
       keep);
  std::vector<Tensor> partials;
  std::vector<Tensor> out;  // dq, dk, dq_weight, dk_weight, dq_bias, dk_bias
  for (int bit = 0; bit < 6; ++bit) {
    const Tensor& x = bit % 2 ? k : q;
    QkSide& side = a.side[bit % 2];
    const bool needed = needs >> bit & 1;
    const int64_t size = a.width * (a.norm == kRmsFull ? side.heads : 1);
    if (bit < 2) {
      out.push_back(empty(x, needed ? shape_of(x) : std::vector<int64_t>{0}, x.scalar_type()));
    } else {
      out.push_back(empty(x, {needed ? size : 0}, ScalarType::Float));
    }
    if (!needed) continue;
    side.wanted = true;
    if (bit < 2) {
      side.dx = data(out.back());
      continue;
    }
    const int64_t blocks = (side.tokens + kQkBlock - 1) / kQkBlock;
    partials.push_back(empty(x, {blocks, size}, ScalarType::Float));
    (bit < 4 ? side.dweight : side.dbias) = data<float>(out.back());
    (bit < 4 ? side.dweight_partial : side.dbias_partial) = data<float>(partials.back());
  }
  for (int s = 0; s < 2; ++s) {
    const Tensor& dy = s ? dyk : dyq;
    if (!a.side[s].wanted) continue;
    STD_TORCH_CHECK(shape_of(dy) == shape_of(s ? k : q) && dtype_of(dy) == a.type,
                    "sora_kernels: dy: expected the shape and dtype of the input");
    a.side[s].dy = heads_of(dy, "dy");
  }
  a.stream = static_cast<int64_t>((out[0].numel() + out[1].numel()) * out[0].element_size()) >=
             kStreamBytes;
  int64_t tokens = 0, chunks = 0;
  for (const QkSide& side : a.side) {
    if (side.wanted) tokens = std::max(tokens, side.tokens);
    chunks += (a.width * (a.norm == kRmsFull ? side.heads : 1) + kQkColumns - 1) / kQkColumns;
  }
  const int64_t blocks = (tokens + kQkBlock - 1) / kQkBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(qk_norm_rope_bwd, a, b, e);
  });
  if (!partials.empty()) {
    torch::stable::parallel_for(0, chunks, 16, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(qk_norm_rope_bwd_finish, a, b, e);
    });
  }
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&forward));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
