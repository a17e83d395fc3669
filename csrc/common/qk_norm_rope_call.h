// The raw ops of qk_norm_rope, from stable-ABI tensors to passes, for any Device that runs passes: those
// of cpu/qk_norm_rope.cpp and cuda/qk_norm_rope.cpp. How tensors come in streams is said in
// ops/qk_norm_rope/raw.py; each stream is one pass of the kernels.
#pragma once
#include <algorithm>
#include <climits>
#include <tuple>

#include "grid.h"
#include "qk.h"
#include "tensors.h"

namespace sora {

using List = std::vector<Tensor>;
using OptionalList = std::optional<List>;

// AOTInductor passes None where a list is empty.
inline const List& list_of(const OptionalList& list) {
  static const List none;
  return list ? *list : none;
}

// [N, H, D] or [B, L, H, D]
inline Heads heads_of(const Tensor& t, const char* name) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(rank == 3 || rank == 4, "sora_kernels: ", name,
                  ": expected [N, H, D] or [B, L, H, D], got ", rank, " dimensions");
  check_unit_stride(t, name);
  return {t.const_data_ptr(), rank == 4 ? tokens_per_batch(t) : std::max<int64_t>(t.size(0), 1),
          rank == 4 ? t.stride(0) : 0, t.stride(rank - 3), t.stride(rank - 2)};
}

inline int64_t tokens_of_heads(const Tensor& t) { return t.numel() / (t.size(-1) * t.size(-2)); }

// What forward and backward are called with, besides gradients.
struct __attribute__((visibility("hidden"))) QkInputs {
  const List &q, &k, &v, &q_weight, &k_weight, &q_bias, &k_bias, &index;
  int64_t tokens;
  Optional tables[8];  // cos, sin, positions, parts of q, then of k
  int64_t places[4];   // part_size and first_token of q, then of k
  const std::vector<int64_t>& axes;
  int64_t norm;
  double eps;
  int64_t pairing, law;

  size_t streams() const { return std::max<size_t>(index.size(), 1); }
  const Tensor& x(bool is_k, size_t stream) const {
    const List& list = is_k ? k : q;
    return list.size() == 1 ? list[0] : list[stream];
  }
  Optional parameter(bool bias, bool is_k, size_t stream) const {
    const List& list = bias ? (is_k ? k_bias : q_bias) : (is_k ? k_weight : q_weight);
    return list.empty() ? Optional{} : Optional{list[stream]};
  }
  void check() const {
    STD_TORCH_CHECK(!q.empty() && q.size() == k.size() && (q.size() == 1 || q.size() == streams()),
                    "sora_kernels: expected q and k, one or as many as index");
    STD_TORCH_CHECK(v.empty() || (v.size() == index.size() && q.size() > 1),
                    "sora_kernels: v: expected one for each of several streams");
    for (const List* list : {&q_weight, &k_weight, &q_bias, &k_bias})
      STD_TORCH_CHECK(list->empty() || list->size() == streams(),
                      "sora_kernels: expected weights and biases for each stream");
    STD_TORCH_CHECK(norm >= kNoNorm && norm <= kRmsFull && pairing >= kInterleaved &&
                        pairing <= kHalfPerAxis,
                    "sora_kernels: norm, pairing: expected one of their codes");
  }
};

inline const int64_t* rows_of_index(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.dim() == 1,
                  "sora_kernels: index: expected contiguous int64 vectors");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// The grids that a side's positions follow from.
inline GridTable grids_of(const Tensor& part_of_token, const Tensor& parts, const int64_t* place) {
  const GridTable grids{ints_of(part_of_token, "part_of_token"), ints_of(parts, "parts"), place[0],
                        place[1]};
  STD_TORCH_CHECK((grids.part_size == kRasterPart || grids.part_size == kTilePart) &&
                      parts.numel() % grids.part_size == 0,
                  "sora_kernels: parts: expected 7 or 11 values for each part");
  return grids;
}

template <class Device>
void fill_tables(Device& device, typename Device::Pass& a, const QkInputs& in) {
  if (!in.tables[0]) return;
  for (int i : {1, 2, 4, 5, 6})
    STD_TORCH_CHECK(in.tables[i], "sora_kernels: rope: expected cos, sin and positions twice");
  STD_TORCH_CHECK(!in.axes.empty() && in.axes.size() <= kMaxAxes,
                  "sora_kernels: rope: expected 1 to 4 axes");
  int64_t pairs = 0;
  for (int64_t size : in.axes) a.axis_end[a.axes++] = pairs += size / 2;
  a.rotate = true;
  a.per_head = in.tables[0]->dim() == 3;
  a.num_positions = in.tables[3] ? 3 : in.tables[2]->size(1);
  STD_TORCH_CHECK(a.num_positions == a.axes || (a.num_positions == 1 && !in.tables[3]),
                  "sora_kernels: positions: expected [N, 1] or [N, axes], or [N] with parts");
  for (int s = 0; s < 2; ++s) {
    auto& side = a.side[s];
    const Tensor &cos = *in.tables[4 * s], &sin = *in.tables[4 * s + 1];
    const Optional &positions = in.tables[4 * s + 2], &parts = in.tables[4 * s + 3];
    for (const Tensor& table : {cos, sin})
      STD_TORCH_CHECK(dtype_of(table) == DType::f32 && table.is_contiguous() &&
                          table.dim() == (a.per_head ? 3 : 2) && table.size(-1) == pairs &&
                          2 * pairs <= a.width && table.size(0) == cos.size(0) &&
                          (!a.per_head || table.size(1) == side.heads),
                      "sora_kernels: rope: expected contiguous fp32 tables of ", pairs, " columns");
    side.cos = static_cast<const float*>(cos.const_data_ptr());
    side.sin = static_cast<const float*>(sin.const_data_ptr());
    side.rope_tokens = positions->size(0);
    STD_TORCH_CHECK(parts.has_value() == in.tables[3].has_value() &&
                        positions->dim() == (parts ? 1 : 2) &&
                        (parts || positions->size(1) == a.num_positions) &&
                        (side.rope_tokens > 0 || side.tokens == 0),
                    "sora_kernels: positions: expected one row per token, alike for q and k");
    if (parts) {
      side.grids = grids_of(*positions, *parts, in.places + 2 * s);
      device.check(side.grids, positions->numel(), parts->numel(), cos.size(0));
    } else {
      side.position_index = ints_of(positions, "positions");
    }
  }
}

template <class Device>
typename Device::Pass pass_of(Device& device, const QkInputs& in, size_t stream) {
  typename Device::Pass a{};
  const Tensor& q = in.x(false, stream);
  a.width = q.size(-1);
  a.type = dtype_of(q);
  a.norm = static_cast<int>(in.norm);
  a.pairing = static_cast<int>(in.pairing);
  a.eps = static_cast<float>(in.eps);
  a.law = static_cast<int>(in.law);
  a.gather = !in.index.empty() && in.q.size() == 1;
  if (!in.index.empty())
    a.index = device.index(in.index[stream], a.gather ? tokens_of_heads(q) : in.tokens);
  for (int s = 0; s < 2; ++s) {
    const Tensor& x = in.x(s, stream);
    STD_TORCH_CHECK(x.dim() == q.dim() && x.size(-1) == a.width && dtype_of(x) == a.type,
                    "sora_kernels: k: expected the rank, head width and dtype of q");
    auto& side = a.side[s];
    side.x = heads_of(x, "q, k");
    side.heads = x.size(-2);
    side.tokens = tokens_of_heads(x);
    STD_TORCH_CHECK(side.tokens <= INT_MAX && in.tokens <= INT_MAX,
                    "sora_kernels: q, k: expected fewer than 2^31 tokens");
    if (!in.index.empty()) {  // a.index is null where a stream has no tokens
      const int64_t count = in.index[stream].numel();
      STD_TORCH_CHECK(a.gather || side.tokens == count,
                      "sora_kernels: index: expected one row for each token of its stream");
      side.tokens = count;
    }
    const int64_t heads = a.norm == kRmsFull ? side.heads : 1;
    side.weight = device.parameter(in.parameter(false, s, stream), heads, a.width, "weight");
    side.bias = device.parameter(in.parameter(true, s, stream), 1, a.width, "bias");
  }
  fill_tables(device, a, in);
  return a;
}

// Rows of v to or from their places in the packed sequence.
template <class Device>
void copy_rows(Device& device, const Tensor& from, Tensor& to, const Tensor& index, bool gather) {
  STD_TORCH_CHECK(tokens_of_heads(gather ? to : from) == index.numel() &&
                      to.size(-2) == from.size(-2) && to.size(-1) == from.size(-1) &&
                      to.scalar_type() == from.scalar_type(),
                  "sora_kernels: v: expected one row of index for each token");
  device.copy_rows(from, to, device.index(index, tokens_of_heads(gather ? from : to)),
                   index.numel(), gather);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> qk_forward(
    List q, List k, OptionalList v, OptionalList q_weight, OptionalList k_weight,
    OptionalList q_bias, OptionalList k_bias, OptionalList index, int64_t tokens, Optional cos,
    Optional sin, Optional positions, Optional parts, Optional k_cos, Optional k_sin,
    Optional k_positions, Optional k_parts, int64_t part_size, int64_t first_token,
    int64_t k_part_size, int64_t k_first_token, std::vector<int64_t> axes, int64_t norm, double eps,
    int64_t pairing, int64_t law) {
  const QkInputs in{q, k, list_of(v), list_of(q_weight), list_of(k_weight), list_of(q_bias),
                    list_of(k_bias), list_of(index), tokens,
                    {cos, sin, positions, parts, k_cos, k_sin, k_positions, k_parts},
                    {part_size, first_token, k_part_size, k_first_token}, axes, norm, eps, pairing, law};
  in.check();
  Device device(q[0]);
  const auto output = [&](const List& x) {
    if (x.empty()) return device.empty({0}, q[0].scalar_type());
    if (x.size() == 1) return device.empty(shape_of(x[0]), x[0].scalar_type());
    return device.empty({tokens, x[0].size(-2), x[0].size(-1)}, x[0].scalar_type());
  };
  Tensor out[] = {output(q), output(k), output(in.v)};
  for (size_t stream = 0; stream < in.streams(); ++stream) {
    auto a = pass_of(device, in, stream);
    for (int s = 0; s < 2; ++s) a.side[s].y = data(out[s]);
    device.forward(a, (out[0].numel() + out[1].numel()) * out[0].element_size());
    if (!in.v.empty()) copy_rows(device, in.v[stream], out[2], in.index[stream], false);
  }
  return {out[0], out[1], out[2]};
}

template <class Device>
List qk_backward(
    Optional dyq, Optional dyk, Optional dyv, List q, List k, OptionalList v,
    OptionalList q_weight, OptionalList k_weight, OptionalList q_bias, OptionalList k_bias,
    OptionalList index, int64_t tokens, Optional cos, Optional sin,
    Optional positions, Optional parts, Optional k_cos, Optional k_sin, Optional k_positions,
    Optional k_parts, int64_t part_size, int64_t first_token, int64_t k_part_size,
    int64_t k_first_token, std::vector<int64_t> axes, int64_t norm, double eps, int64_t pairing,
    int64_t law, std::vector<int64_t> needs) {
  const QkInputs in{q, k, list_of(v), list_of(q_weight), list_of(k_weight), list_of(q_bias),
                    list_of(k_bias), list_of(index), tokens,
                    {cos, sin, positions, parts, k_cos, k_sin, k_positions, k_parts},
                    {part_size, first_token, k_part_size, k_first_token}, axes, norm, eps, pairing, law};
  in.check();
  const List* lists[] = {&q, &k, &in.v, &in.q_weight, &in.k_weight, &in.q_bias, &in.k_bias};
  size_t start[8] = {0};
  for (int i = 0; i < 7; ++i) start[i + 1] = start[i] + lists[i]->size();
  STD_TORCH_CHECK(needs.size() == start[7], "sora_kernels: needs: expected one per tensor");
  Device device(q[0]);
  List out;
  for (int i = 0; i < 7; ++i)
    for (const Tensor& t : *lists[i])
      out.push_back(device.empty(needs[out.size()] ? shape_of(t) : std::vector<int64_t>{0},
                                 i < 3 ? t.scalar_type() : ScalarType::Float));
  const auto wanted = [&](int list, size_t stream) -> Tensor* {
    if (lists[list]->empty()) return nullptr;
    const size_t place = start[list] + (lists[list]->size() == 1 ? 0 : stream);
    return needs[place] ? &out[place] : nullptr;
  };
  const Optional dy[] = {dyq, dyk};
  for (size_t stream = 0; stream < in.streams(); ++stream) {
    auto a = pass_of(device, in, stream);
    int64_t bytes = 0;  // of dx
    for (int s = 0; s < 2; ++s) {
      auto& side = a.side[s];
      Tensor *dx = wanted(s, stream), *dweight = wanted(3 + s, stream),
             *dbias = wanted(5 + s, stream);
      side.wanted = dx || dweight || dbias;
      if (!side.wanted) continue;
      // A packed result has as many rows for q as for k.
      const int64_t rows = in.index.empty() || a.gather ? tokens_of_heads(in.x(s, stream)) : tokens;
      STD_TORCH_CHECK(dy[s] && dtype_of(*dy[s]) == a.type && dy[s]->size(-1) == a.width &&
                          dy[s]->size(-2) == side.heads,
                      "sora_kernels: dy: expected the heads and dtype of the input");
      STD_TORCH_CHECK(tokens_of_heads(*dy[s]) == rows,
                      "sora_kernels: dy: expected as many tokens as the result");
      side.dy = heads_of(*dy[s], "dy");
      if (dx) bytes += static_cast<int64_t>(dx->numel() * dx->element_size());
      if (dx) side.dx = data(*dx);
      if (dweight) side.dweight = data<float>(*dweight);
      if (dbias) side.dbias = data<float>(*dbias);
    }
    device.backward(a, bytes);
    if (Tensor* dv = wanted(2, stream)) copy_rows(device, *dyv, *dv, in.index[stream], true);
  }
  return out;
}

}  // namespace sora
