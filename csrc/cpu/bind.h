// Helpers of the CPU bindings, on top of those of csrc/common/tensors.h.
#pragma once
#include <algorithm>

#include "tensors.h"

#define SORA_CPU_OP(op, forward, backward) \
  SORA_RAW_OP(sora_kernels, CPU, op, "", forward, backward)

namespace sora {

// Outputs larger than this are written past the cache: they will not be found there again.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline bool past_cache(int64_t numbers, DType type) {
  return numbers * (type == DType::f32 ? 4 : 2) >= kStreamBytes;
}
inline bool past_cache(const Tensor& t) { return past_cache(t.numel(), dtype_of(t)); }

// Tokens of a unit of work of kernels that go token by token.
inline int64_t token_grain(int64_t width) { return 1 + 16384 / (width + 1); }

inline int64_t blocks_of(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }
inline int64_t chunks_of(int64_t width) { return (width + kColumns - 1) / kColumns; }

// What a call needs of its device: memory like that of a tensor, and for its own time.
class Cpu {
 public:
  explicit Cpu(const Tensor& like) : like_(like) {}

  Tensor empty(std::vector<int64_t> shape, ScalarType type) const {
    return sora::empty(like_, std::move(shape), type);
  }
  static int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

  // A [D] vector as fp32: the tensor's own memory, or a converted copy.
  const float* vector(const Optional& t, int64_t width, const char* name) {
    if (!t) return nullptr;
    check_vector(*t, width, name);
    const DType type = dtype_of(*t);
    if (type == DType::f32) return static_cast<const float*>(t->const_data_ptr());
    std::vector<float>& copy = kept_.emplace_back(width);
    for (int64_t d = 0; d < width; ++d) {
      if (type == DType::bf16) {
        copy[d] = static_cast<float>(t->const_data_ptr<torch::headeronly::BFloat16>()[d]);
      } else {
        copy[d] = static_cast<float>(t->const_data_ptr<torch::headeronly::Half>()[d]);
      }
    }
    return copy.data();
  }

  const float* constant(int64_t width, float value) {
    return kept_.emplace_back(width, value).data();
  }

 private:
  const Tensor& like_;
  std::vector<std::vector<float>> kept_;
};

// Memory for gradients of tokens, and for those that are sums over tokens with their partial sums
// until stage two has run.
class Gradients {
 public:
  Gradients(const Cpu& device, int64_t tokens, int64_t width, const RowMap&, bool one_token_rows)
      : device_(device), width_(width), blocks_(blocks_of(tokens)), whole_(one_token_rows) {}

  Tensor none() const { return device_.empty({0}, ScalarType::Float); }  // outputs must not alias

  Tensor tokens(bool wanted, const Tensor& like, ScalarType type, void*& result) const {
    if (!wanted) return none();
    Tensor grad = device_.empty(shape_of(like), type);
    result = data(grad);
    return grad;
  }

  // Of a modulation [R, D]. One that is summed further, over rows (for its table), stays fp32.
  Tensor modulation(bool wanted, const Optional& of, bool table, RowGrad& sum) {
    if (!wanted || !of) return none();
    Tensor grad =
        device_.empty({of->size(0), width_}, table ? ScalarType::Float : of->scalar_type());
    sum = {data(grad), dtype_of(grad), whole_ ? nullptr : partial({blocks_, 2, width_})};
    if (!whole_) rows_ = std::max(rows_, of->size(0));
    return grad;
  }

  // Of a vector [D]: fp32, over all tokens.
  Tensor vector(bool wanted, const Optional& of, VectorGrad& sum) {
    if (!wanted || !of) return none();
    Tensor grad = device_.empty({width_}, ScalarType::Float);
    sum = {data<float>(grad), partial({blocks_, width_})};
    vectors_ = true;
    return grad;
  }

  // run(begin, end) over the units of finish_sums (csrc/common/grouped_sum.h).
  template <class Run>
  void finish(Run run) const {
    const int64_t chunks = chunks_of(width_), first = vectors_ ? 0 : chunks;
    const int64_t last = chunks * (1 + rows_);
    if (first < last) torch::stable::parallel_for(first, last, 16, run);
  }

 private:
  float* partial(std::vector<int64_t> shape) {
    partials_.push_back(device_.empty(std::move(shape), ScalarType::Float));
    return data<float>(partials_.back());
  }

  const Cpu& device_;
  int64_t width_, blocks_, rows_ = 0;
  bool whole_, vectors_ = false;
  std::vector<Tensor> partials_;
};

}  // namespace sora
