// Helpers of the CPU bindings, on top of those of csrc/common/tensors.h.
#pragma once
#include <algorithm>

#include "gradients.h"

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

// Gradients, those that are sums over tokens with what stage two needs.
class Gradients : public GradientMemory<Cpu> {
 public:
  Gradients(const Cpu& device, int64_t tokens, int64_t width, const RowMap&, bool one_token_rows)
      : GradientMemory(device, width), blocks_(blocks_of(tokens)), whole_(one_token_rows) {}

  Tensor modulation(bool wanted, const Optional& of, bool table, RowGrad& sum) {
    if (!wanted || !of) return none();
    Tensor grad = new_modulation(*of, table);
    sum = {data(grad), dtype_of(grad), whole_ ? nullptr : partial({blocks_, 2, width_})};
    if (!whole_) rows_ = std::max(rows_, of->size(0));
    return grad;
  }

  // Of a vector [D]: fp32, over all tokens.
  Tensor vector(bool wanted, const Optional& of, VectorGrad& sum) {
    if (!wanted || !of) return none();
    Tensor grad = new_vector();
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
  int64_t blocks_, rows_ = 0;
  bool whole_, vectors_ = false;
};

// The Device of an op with a norm: Kernels names its structs and kernels, and says which backwards
// write past the cache.
template <class Kernels>
class NormDevice : public Cpu {
 public:
  using Forward = typename Kernels::Forward;
  using Backward = typename Kernels::Backward;
  using Gradients = sora::Gradients;
  using Cpu::Cpu;

  void forward(Forward& a) const {
    a.stream = past_cache(a.tokens * a.width, a.out_type);
    torch::stable::parallel_for(0, a.tokens, token_grain(a.width),
                                [&](int64_t b, int64_t e) { Kernels::forward(a, b, e); });
  }

  void backward(Backward& a, const Gradients& grads) const {
    a.stream = Kernels::past_cache(a, a.tokens * a.width);
    torch::stable::parallel_for(0, blocks_of(a.tokens), 1,
                                [&](int64_t b, int64_t e) { Kernels::backward(a, b, e); });
    grads.finish([&](int64_t b, int64_t e) { Kernels::finish(a, b, e); });
  }
};

}  // namespace sora
