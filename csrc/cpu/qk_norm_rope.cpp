// CPU binding of qk_norm_rope: stable-ABI tensors in, kernels on torch's thread pool. How tensors
// come in streams is said in ops/qk_norm_rope/raw.py; each stream is one pass of the kernels.
#include "qk_norm_rope.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "bind.h"

namespace sora {
namespace {

using List = std::vector<Tensor>;
using Kept = std::vector<std::vector<float>>;

// [N, H, D] or [B, L, H, D]
Heads heads_of(const Tensor& t, const char* name) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(rank == 3 || rank == 4, "sora_kernels: ", name,
                  ": expected [N, H, D] or [B, L, H, D], got ", rank, " dimensions");
  check_unit_stride(t, name);
  return {t.const_data_ptr(), std::max<int64_t>(t.size(rank - 3), 1),
          rank == 4 ? t.stride(0) : 0, t.stride(rank - 3), t.stride(rank - 2)};
}

int64_t tokens_of_heads(const Tensor& t) { return t.numel() / (t.size(-1) * t.size(-2)); }

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

Optional at(const List& list, size_t stream) {
  return list.empty() ? Optional{} : Optional{list[stream]};
}

// Values are looked at: a wrong one would write outside of the result.
const int64_t* index_of(const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.dim() == 1,
                  "sora_kernels: index: expected contiguous int64 vectors");
  const int64_t* values = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t n = 0; n < t.numel(); ++n)
    STD_TORCH_CHECK(values[n] >= 0 && values[n] < rows, "sora_kernels: index: expected values in [0, ",
                    rows, "), got ", values[n]);
  return values;
}

// What forward and backward are called with, besides gradients.
struct Inputs {
  const List &q, &k, &v, &q_weight, &k_weight, &q_bias, &k_bias, &index;
  int64_t tokens;
  const Optional* tables;  // cos, sin, positions, parts of q, then of k
  const int64_t* places;   // part_size and first_token of q, then of k
  const std::vector<int64_t>& axes;
  int64_t norm;
  double eps;
  int64_t pairing, law;

  size_t streams() const { return std::max<size_t>(index.size(), 1); }
  const Tensor& x(bool is_k, size_t stream) const {
    const List& list = is_k ? k : q;
    return list.size() == 1 ? list[0] : list[stream];
  }
  void check() const {
    STD_TORCH_CHECK(!q.empty() && q.size() == k.size() && (q.size() == 1 || q.size() == streams()),
                    "sora_kernels: expected q and k, one or as many as index");
    STD_TORCH_CHECK(v.empty() || (v.size() == index.size() && q.size() > 1),
                    "sora_kernels: v: expected one for each of several streams");
    for (const List* list : {&q_weight, &k_weight, &q_bias, &k_bias})
      STD_TORCH_CHECK(list->empty() || list->size() == streams(),
                      "sora_kernels: expected weights and biases for each stream");
  }
};

// The grids that a side's positions follow from. Their values are looked at, as those of `index`
// are: a wrong one would read outside of the tables.
GridTable grids_of(const Tensor& part_of_token, const Tensor& parts, const int64_t* place,
                   int64_t rows) {
  const GridTable grids{ints_of(part_of_token, "part_of_token"), ints_of(parts, "parts"), place[0],
                        place[1]};
  STD_TORCH_CHECK((grids.part_size == kRasterPart || grids.part_size == kTilePart) &&
                      parts.numel() % grids.part_size == 0,
                  "sora_kernels: parts: expected 7 or 11 values for each part");
  const int64_t count = parts.numel() / grids.part_size;
  bool good = true;
  for (int64_t i = 0; i < count; ++i) {
    const GridPart& p = *reinterpret_cast<const GridPart*>(grids.parts + i * grids.part_size);
    good = good && p.last >= 0 && p.h > 0 && p.w > 0;
    if (!good) break;
    const int64_t size[] = {p.last / (int64_t{p.h} * p.w) + 1, p.h, p.w};
    for (int axis = 0; axis < 3; ++axis) {
      good = good && p.row[axis] >= 0 && p.row[axis] + size[axis] <= rows;
      if (grids.tiled()) good = good && p.t == size[0] && p.tile[axis] > 0 && p.tile[axis] <= size[axis];
    }
  }
  STD_TORCH_CHECK(good, "sora_kernels: parts: expected grids within the ", rows, " rows of the tables");
  bool outside = false;
  for (int64_t n = 0; n < part_of_token.numel(); ++n)
    outside |= static_cast<uint32_t>(grids.part_of_token[n]) >= static_cast<uint32_t>(count);
  STD_TORCH_CHECK(!outside, "sora_kernels: part_of_token: expected values in [0, ", count, ")");
  return grids;
}

void fill_tables(QkNormRope& a, const Inputs& in) {
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
    QkSide& side = a.side[s];
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
    if (parts) side.grids = grids_of(*positions, *parts, in.places + 2 * s, cos.size(0));
    else side.position_index = ints_of(positions, "positions");
  }
  const QkSide &q = a.side[0], &k = a.side[1];
  a.same_tables = q.cos == k.cos && q.sin == k.sin && q.position_index == k.position_index &&
                  q.grids.part_of_token == k.grids.part_of_token && q.grids.parts == k.grids.parts &&
                  q.grids.part_size == k.grids.part_size &&
                  q.grids.first_token == k.grids.first_token && q.rope_tokens == k.rope_tokens;
}

// One pass. `keep` owns converted vectors for the time of the call.
QkNormRope pass_of(const Inputs& in, size_t stream, Kept& keep) {
  QkNormRope a{};
  keep.reserve(keep.size() + 4);
  const Tensor& q = in.x(false, stream);
  a.width = q.size(-1);
  a.type = dtype_of(q);
  a.norm = static_cast<int>(in.norm);
  a.pairing = static_cast<int>(in.pairing);
  a.eps = static_cast<float>(in.eps);
  a.law = static_cast<int>(in.law);
  a.gather = !in.index.empty() && in.q.size() == 1;
  if (!in.index.empty())
    a.index = index_of(in.index[stream], a.gather ? tokens_of_heads(q) : in.tokens);
  for (int s = 0; s < 2; ++s) {
    const Tensor& x = in.x(s, stream);
    STD_TORCH_CHECK(x.dim() == q.dim() && x.size(-1) == a.width && dtype_of(x) == a.type,
                    "sora_kernels: k: expected the rank, head width and dtype of q");
    QkSide& side = a.side[s];
    side.x = heads_of(x, "q, k");
    side.heads = x.size(-2);
    side.tokens = tokens_of_heads(x);
    if (!in.index.empty()) {  // a.index is null where a stream has no tokens
      const int64_t count = in.index[stream].numel();
      STD_TORCH_CHECK(a.gather || side.tokens == count,
                      "sora_kernels: index: expected one row for each token of its stream");
      side.tokens = count;
    }
    const int64_t size = a.width * (a.norm == kRmsFull ? side.heads : 1);
    side.weight = vector_of(at(s ? in.k_weight : in.q_weight, stream), size, "weight", keep);
    side.bias = vector_of(at(s ? in.k_bias : in.q_bias, stream), a.width, "bias", keep);
  }
  fill_tables(a, in);
  return a;
}

// Rows of a stream to or from their places in the packed sequence. Both have [H, D] per token.
void copy_rows(const Tensor& from, Tensor& to, const Tensor& index, bool gather) {
  const Heads x = heads_of(from, "v");
  const int64_t* rows = index_of(index, tokens_of_heads(gather ? from : to));
  const int64_t heads = from.size(-2), size = from.element_size(), head = from.size(-1) * size;
  STD_TORCH_CHECK(tokens_of_heads(gather ? to : from) == index.numel() && to.size(-2) == heads &&
                      to.size(-1) == from.size(-1) && to.scalar_type() == from.scalar_type(),
                  "sora_kernels: v: expected one row of index for each token");
  char* out = data<char>(to);
  torch::stable::parallel_for(0, index.numel(), 1 + 65536 / (heads * head + 1),
                              [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t source = gather ? rows[n] : n, target = gather ? n : rows[n];
      const char* row = static_cast<const char*>(x.data) +
                        ((source / x.per_batch) * x.batch_stride +
                         (source % x.per_batch) * x.token_stride) * size;
      char* at = out + target * heads * head;
      if (x.head_stride * size == head) {
        std::memcpy(at, row, heads * head);
      } else {
        for (int64_t h = 0; h < heads; ++h)
          std::memcpy(at + h * head, row + h * x.head_stride * size, head);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    List q, List k, List v, List q_weight, List k_weight, List q_bias, List k_bias, List index,
    int64_t tokens, Optional cos, Optional sin, Optional positions, Optional parts, Optional k_cos,
    Optional k_sin, Optional k_positions, Optional k_parts, int64_t part_size,
    int64_t first_token, int64_t k_part_size, int64_t k_first_token, std::vector<int64_t> axes,
    int64_t norm, double eps, int64_t pairing, int64_t law) {
  const Optional tables[] = {cos, sin, positions, parts, k_cos, k_sin, k_positions, k_parts};
  const int64_t places[] = {part_size, first_token, k_part_size, k_first_token};
  const Inputs in{q, k, v, q_weight, k_weight, q_bias, k_bias, index, tokens, tables, places, axes,
                  norm, eps, pairing, law};
  in.check();
  const auto output = [&](const List& x) {
    if (x.empty()) return empty(q[0], {0}, q[0].scalar_type());
    if (x.size() == 1) return empty(x[0], shape_of(x[0]), x[0].scalar_type());
    return empty(x[0], {tokens, x[0].size(-2), x[0].size(-1)}, x[0].scalar_type());
  };
  Tensor out[] = {output(q), output(k), output(v)};
  Kept keep;
  for (size_t stream = 0; stream < in.streams(); ++stream) {
    QkNormRope a = pass_of(in, stream, keep);
    for (int s = 0; s < 2; ++s) a.side[s].y = data(out[s]);
    a.stream = static_cast<int64_t>((out[0].numel() + out[1].numel()) * out[0].element_size()) >=
               kStreamBytes;
    const int64_t work = a.width * (a.side[0].heads + a.side[1].heads);
    const int64_t most = std::max(a.side[0].tokens, a.side[1].tokens);
    torch::stable::parallel_for(0, most, 1 + 16384 / (work + 1), [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(qk_norm_rope_fwd, a, b, e);
    });
    if (!v.empty()) copy_rows(v[stream], out[2], index[stream], false);
  }
  return {out[0], out[1], out[2]};
}

// Gradients of one pass into its places of `out`: x of q and k, then [weight, bias] of q and of k
// (null where it is not needed).
void backward_pass(QkNormRope& a, const Optional* dy, const int64_t* expected, Tensor* const* x,
                   Tensor* const* parameters) {
  List partials;
  for (int s = 0; s < 2; ++s) {
    QkSide& side = a.side[s];
    Tensor *weight = parameters[2 * s], *bias = parameters[2 * s + 1];
    side.wanted = x[s] || weight || bias;
    if (!side.wanted) continue;
    STD_TORCH_CHECK(dy[s] && dtype_of(*dy[s]) == a.type && dy[s]->size(-1) == a.width &&
                        dy[s]->size(-2) == side.heads,
                    "sora_kernels: dy: expected the heads and dtype of the input");
    STD_TORCH_CHECK(tokens_of_heads(*dy[s]) == expected[s],
                    "sora_kernels: dy: expected as many tokens as the result");
    side.dy = heads_of(*dy[s], "dy");
    if (x[s]) side.dx = data(*x[s]);
    const int64_t blocks = (side.tokens + kQkBlock - 1) / kQkBlock;
    const auto partial = [&](Tensor* of) -> float* {
      if (!of) return nullptr;
      partials.push_back(empty(*of, {blocks, of->numel()}, ScalarType::Float));
      return data<float>(partials.back());
    };
    side.dweight_partial = partial(weight);
    side.dbias_partial = partial(bias);
    side.dweight = weight ? data<float>(*weight) : nullptr;
    side.dbias = bias ? data<float>(*bias) : nullptr;
  }
  int64_t tokens = 0, chunks = 0;
  for (const QkSide& side : a.side) {
    if (side.wanted) tokens = std::max(tokens, side.tokens);
    chunks += (a.width * (a.norm == kRmsFull ? side.heads : 1) + kQkColumns - 1) / kQkColumns;
  }
  torch::stable::parallel_for(0, (tokens + kQkBlock - 1) / kQkBlock, 1, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(qk_norm_rope_bwd, a, b, e);
  });
  if (partials.empty()) return;
  torch::stable::parallel_for(0, chunks, 16, [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(qk_norm_rope_bwd_finish, a, b, e);
  });
}

List backward(Optional dyq, Optional dyk, Optional dyv, List q, List k, List v, List q_weight,
              List k_weight, List q_bias, List k_bias, List index, int64_t tokens, Optional cos,
              Optional sin, Optional positions, Optional parts, Optional k_cos, Optional k_sin,
              Optional k_positions, Optional k_parts, int64_t part_size, int64_t first_token,
              int64_t k_part_size, int64_t k_first_token, std::vector<int64_t> axes, int64_t norm,
              double eps, int64_t pairing, int64_t law, std::vector<int64_t> needs) {
  const Optional tables[] = {cos, sin, positions, parts, k_cos, k_sin, k_positions, k_parts};
  const int64_t places[] = {part_size, first_token, k_part_size, k_first_token};
  const Inputs in{q, k, v, q_weight, k_weight, q_bias, k_bias, index, tokens, tables, places, axes,
                  norm, eps, pairing, law};
  in.check();
  const List* lists[] = {&q, &k, &v, &q_weight, &k_weight, &q_bias, &k_bias};
  size_t start[8] = {0};
  for (int i = 0; i < 7; ++i) start[i + 1] = start[i] + lists[i]->size();
  STD_TORCH_CHECK(needs.size() == start[7], "sora_kernels: needs: expected one per tensor");
  List out;
  for (int i = 0; i < 7; ++i)
    for (const Tensor& t : *lists[i])
      out.push_back(empty(t, needs[out.size()] ? shape_of(t) : std::vector<int64_t>{0},
                          i < 3 ? t.scalar_type() : ScalarType::Float));
  const auto wanted = [&](int list, size_t stream) -> Tensor* {
    if (lists[list]->empty()) return nullptr;
    const size_t place = start[list] + (lists[list]->size() == 1 ? 0 : stream);
    return needs[place] ? &out[place] : nullptr;
  };
  const Optional dy[] = {dyq, dyk};
  Kept keep;
  for (size_t stream = 0; stream < in.streams(); ++stream) {
    QkNormRope a = pass_of(in, stream, keep);
    Tensor* x[] = {wanted(0, stream), wanted(1, stream)};
    Tensor* parameters[] = {wanted(3, stream), wanted(5, stream), wanted(4, stream),
                            wanted(6, stream)};
    int64_t bytes = 0;
    for (const Tensor* t : x) bytes += t ? static_cast<int64_t>(t->numel() * t->element_size()) : 0;
    a.stream = bytes >= kStreamBytes;
    // A packed result has as many rows for q as for k.
    int64_t rows[2];
    for (int s = 0; s < 2; ++s)
      rows[s] = !index.empty() && !a.gather ? tokens : tokens_of_heads(in.x(s, stream));
    backward_pass(a, dy, rows, x, parameters);
    if (Tensor* dv = wanted(2, stream)) copy_rows(*dyv, *dv, index[stream], true);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&forward));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
