// The deterministic grouped reduction behind the gradients of row-indexed modulation.
//
// Tokens, sorted by row, are cut into fixed blocks. Within a block a running sum is kept; when the
// row changes it is flushed: straight to the result if the whole row lies in this block, else to
// one of the block's two partial slots (0 "head": the row began in an earlier block, 1 "tail": it
// goes on into the next). Stage two adds, for each row that spans blocks, its tail and then its
// heads. The order depends on the shapes alone, never on the number of threads.
#pragma once
#include <cstdint>

#include "rows.h"
#include "vec.h"

namespace sora::SORA_ISA {

inline void load_f32(const Matrix& m, int64_t row, int64_t n, float* out) {
  auto copy = [&](auto* base) {
    const auto* p = base + row * m.stride;
    for_row(n, [&](int64_t d, auto io) { io.put(out + d, io.get(p + d)); });
  };
  if (m.type == DType::f32) copy(static_cast<const float*>(m.data));
  else if (m.type == DType::bf16) copy(static_cast<const bf16*>(m.data));
  else copy(static_cast<const f16*>(m.data));
}

inline void store_f32(void* data, DType type, int64_t offset, int64_t n, const float* in) {
  auto copy = [&](auto* base) {
    auto* p = base + offset;
    for_row(n, [&](int64_t d, auto io) { io.put(p + d, io.get(in + d)); });
  };
  if (type == DType::f32) copy(static_cast<float*>(data));
  else if (type == DType::bf16) copy(static_cast<bf16*>(data));
  else copy(static_cast<f16*>(data));
}

// The running sum of `row` in a block.
inline void flush_sum(const RowGrad& g, const RowMap& map, int64_t row, int64_t block,
                      int64_t tokens, int64_t width, const float* sum) {
  int64_t start = block * kBlockTokens;
  int64_t end = start + kBlockTokens < tokens ? start + kBlockTokens : tokens;
  int64_t first = row_begin(map, row), last = row_begin(map, row + 1);
  if (first >= start && last <= end) {
    store_f32(g.result, g.type, row * width, width, sum);
    return;
  }
  int64_t slot = first < start ? 0 : 1;
  float* out = g.partial + (block * 2 + slot) * width;
  for_row(width, [&](int64_t d, auto io) { io.put(out + d, io.get(sum + d)); });
}

// Stage two for columns [column, column + n) of one row. Accumulates in double: it is free here.
inline void finish_sum(const RowGrad& g, const RowMap& map, int64_t row, int64_t width,
                       int64_t column, int64_t n) {
  int64_t first = row_begin(map, row), last = row_begin(map, row + 1);
  float out[kColumns] = {};
  if (last > first) {
    int64_t block = first / kBlockTokens, end_block = (last - 1) / kBlockTokens;
    if (block == end_block) return;  // flushed whole
    double sum[kColumns] = {};
    const float* tail = g.partial + (block * 2 + 1) * width + column;
    for (int64_t d = 0; d < n; ++d) sum[d] = tail[d];
    for (int64_t b = block + 1; b <= end_block; ++b) {
      const float* head = g.partial + b * 2 * width + column;
      for (int64_t d = 0; d < n; ++d) sum[d] += head[d];
    }
    for (int64_t d = 0; d < n; ++d) out[d] = static_cast<float>(sum[d]);
  }
  store_f32(g.result, g.type, row * width + column, n, out);
}

// Sum over all blocks of partial[block, D] (weight and bias gradients), columns as above.
inline void finish_columns(const float* partial, int64_t blocks, int64_t width, int64_t column,
                           int64_t n, float* out) {
  double sum[kColumns] = {};
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t d = 0; d < n; ++d) sum[d] += partial[b * width + column + d];
  for (int64_t d = 0; d < n; ++d) out[column + d] = static_cast<float>(sum[d]);
}

// Units [begin, end) of stage two: unit u is columns chunk u % chunks of row u / chunks - 1; row -1
// stands for the vectors.
template <int V, int R>
inline void finish_sums(const VectorGrad* const (&vectors)[V], const RowGrad* const (&grads)[R],
                        const RowMap& map, int64_t tokens, int64_t width, int64_t begin,
                        int64_t end) {
  const int64_t chunks = (width + kColumns - 1) / kColumns;
  const int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / chunks - 1, column = unit % chunks * kColumns;
    const int64_t n = column + kColumns < width ? kColumns : width - column;
    if (row < 0) {
      for (const VectorGrad* g : vectors)
        if (g->result) finish_columns(g->partial, blocks, width, column, n, g->result);
    } else {
      for (const RowGrad* g : grads)
        if (g->partial) finish_sum(*g, map, row, width, column, n);
    }
  }
}

}  // namespace sora::SORA_ISA
