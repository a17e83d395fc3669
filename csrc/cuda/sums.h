// What bindings and kernels say to each other about gradients that are sums over tokens. No CUDA headers
// here: bindings are compiled by the C++ compiler.
#pragma once
#include "rows.h"

namespace sora::cuda {

using Stream = void*;  // a cudaStream_t

// A gradient [R, D] under reduction, R rows of `rows`. That of a [D] vector has one row, of all tokens.
struct GroupedSum {
  RowGrad grad;  // result null: not wanted; partial [blocks, 2, D] null: every row is one token
  RowMap rows;
  int64_t num_rows = 0;
};

// Sorted tokens per block: about a thousand blocks fill any GPU, and more only write more partials.
inline int block_tokens(int64_t tokens) {
  constexpr int64_t kBlocks = 1024, kFewest = 4;
  const int64_t share = (tokens + kBlocks - 1) / kBlocks;
  return static_cast<int>(share < kFewest ? kFewest : share);
}

constexpr int kMaxSums = 6;

struct FinishSums {
  int64_t tokens, block_tokens;
  int width;
  int count = 0;
  GroupedSum sum[kMaxSums];

  void add(const GroupedSum& g) {
    if (g.grad.result && g.grad.partial) sum[count++] = g;
  }
};

void finish_sums(const FinishSums& a, Stream stream);

}  // namespace sora::cuda
