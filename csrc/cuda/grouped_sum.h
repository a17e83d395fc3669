// The deterministic grouped reduction behind the gradients of modulations, weights and biases; the
// scheme is that of csrc/common/grouped_sum.h. Tokens, sorted by row, are cut into blocks. Whoever
// takes a block keeps a running sum and flushes it when the row changes: straight to the result if
// the whole row lies in this block, else to one of the block's two partial rows (0 "head": the row
// began in an earlier block, 1 "tail": it goes on into the next). `finish_sums` then adds, for each
// row that spans blocks, its tail and its heads. No atomics; the order depends on the shapes alone.
#pragma once
#include "launch.h"
#include "sums.h"
#include "vectors.h"

namespace sora::cuda {

struct TokenBlock {
  int number, start, stop;  // sorted positions
};

// Empty past the last token.
SORA_D TokenBlock token_block(int64_t number, int64_t tokens, int size) {
  const int64_t start = number * size < tokens ? number * size : tokens;
  const int64_t stop = start + size < tokens ? start + size : tokens;
  return {static_cast<int>(number), static_cast<int>(start), static_cast<int>(stop)};
}

// The running sum of `row` in a block, V columns of it.
template <int V>
SORA_D void flush(const GroupedSum& g, const TokenBlock& block, int64_t row, int width, int column,
                  const float (&v)[V]) {
  const int64_t first = row_begin(g.rows, row), last = row_begin(g.rows, row + 1);
  if (first >= block.start && last <= block.stop) {
    store<V>(g.grad.result, g.grad.type, row * width + column, v);
  } else {
    const int64_t slot = int64_t{block.number} * 2 + (first < block.start ? 0 : 1);
    store<float, V>(g.grad.partial + slot * width + column, v);
  }
}

}  // namespace sora::cuda
