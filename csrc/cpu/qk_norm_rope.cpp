// CPU binding of qk_norm_rope: kernels on torch's thread pool.
#include "qk_norm_rope.h"

#include <cstring>

#include "bind.h"
#include "qk_norm_rope_call.h"

namespace sora {
namespace {

class Device : public Cpu {
 public:
  using Pass = QkNormRope;
  using Cpu::Cpu;

  // Values are looked at, here and in check(): a wrong one would write or read outside of memory.
  const int64_t* index(const Tensor& t, int64_t rows) const {
    const int64_t* values = rows_of_index(t);
    for (int64_t n = 0; n < t.numel(); ++n)
      STD_TORCH_CHECK(values[n] >= 0 && values[n] < rows,
                      "sora_kernels: index: expected values in [0, ", rows, "), got ", values[n]);
    return values;
  }

  void check(const GridTable& grids, int64_t tokens, int64_t values, int64_t rows) const {
    const int64_t count = values / grids.part_size;
    bool good = true;
    for (int64_t i = 0; i < count; ++i) {
      const GridPart& p = *reinterpret_cast<const GridPart*>(grids.parts + i * grids.part_size);
      good = good && p.last >= 0 && p.h > 0 && p.w > 0;
      if (!good) break;
      const int64_t size[] = {p.last / (int64_t{p.h} * p.w) + 1, p.h, p.w};
      for (int axis = 0; axis < 3; ++axis) {
        good = good && p.row[axis] >= 0 && p.row[axis] + size[axis] <= rows;
        if (grids.tiled())
          good = good && p.t == size[0] && p.tile[axis] > 0 && p.tile[axis] <= size[axis];
      }
    }
    STD_TORCH_CHECK(good, "sora_kernels: parts: expected grids within the ", rows,
                    " rows of the tables");
    bool outside = false;
    for (int64_t n = 0; n < tokens; ++n)
      outside |= static_cast<uint32_t>(grids.part_of_token[n]) >= static_cast<uint32_t>(count);
    STD_TORCH_CHECK(!outside, "sora_kernels: part_of_token: expected values in [0, ", count, ")");
  }

  const float* parameter(const Optional& t, int64_t heads, int64_t width, const char* name) {
    return vector(t, heads * width, name);
  }

  void forward(QkNormRope& a, int64_t bytes) const {
    set_same_tables(a);
    a.stream = bytes >= kStreamBytes;
    const int64_t work = a.width * (a.side[0].heads + a.side[1].heads);
    const int64_t most = std::max(a.side[0].tokens, a.side[1].tokens);
    torch::stable::parallel_for(0, most, token_grain(work), [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(qk_norm_rope_fwd, a, b, e);
    });
  }

  void backward(QkNormRope& a, int64_t bytes) const {
    set_same_tables(a);
    a.stream = bytes >= kStreamBytes;
    List partials;
    int64_t tokens = 0, chunks = 0;
    for (QkSide& side : a.side) {
      const int64_t size = a.width * (a.norm == kRmsFull ? side.heads : 1);
      const auto partial = [&](const float* of, int64_t columns) -> float* {
        if (!of) return nullptr;
        partials.push_back(empty({blocks_of(side.tokens), columns}, ScalarType::Float));
        return data<float>(partials.back());
      };
      side.dweight_partial = partial(side.dweight, size);
      side.dbias_partial = partial(side.dbias, a.width);
      if (side.wanted) tokens = std::max(tokens, side.tokens);
      chunks += chunks_of(size);
    }
    torch::stable::parallel_for(0, blocks_of(tokens), 1, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(qk_norm_rope_bwd, a, b, e);
    });
    if (partials.empty()) return;
    torch::stable::parallel_for(0, chunks, 16, [&](int64_t b, int64_t e) {
      SORA_CALL_KERNEL_BF16(qk_norm_rope_bwd_finish, a, b, e);
    });
  }

  // Both have [H, D] per token.
  void copy_rows(const Tensor& from, Tensor& to, const int64_t* rows, int64_t count,
                 bool gather) const {
    const Heads x = heads_of(from, "v");
    const int64_t heads = from.size(-2), size = from.element_size(), head = from.size(-1) * size;
    char* out = data<char>(to);
    torch::stable::parallel_for(0, count, 1 + 65536 / (heads * head + 1),
                                [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t source = gather ? rows[n] : n, target = gather ? n : rows[n];
        const char* row = static_cast<const char*>(x.data) + token_offset(x, source) * size;
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

 private:
  static void set_same_tables(QkNormRope& a) {
    const QkSide &q = a.side[0], &k = a.side[1];
    a.same_tables =
        q.cos == k.cos && q.sin == k.sin && q.position_index == k.position_index &&
        q.grids.part_of_token == k.grids.part_of_token && q.grids.parts == k.grids.parts &&
        q.grids.part_size == k.grids.part_size && q.grids.first_token == k.grids.first_token &&
        q.rope_tokens == k.rope_tokens;
  }
};

}  // namespace

SORA_CPU_OP(qk_norm_rope, qk_forward<Device>, qk_backward<Device>)

}  // namespace sora
