// Helpers of the CUDA bindings, on top of those of csrc/common/tensors.h. No CUDA headers here, so
// bindings are compiled by the C++ compiler.
//
// The emulator of tests/cuda_emulator compiles the same bindings for the CPU dispatch key of a library
// of its own: SORA_EMULATED.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "gradients.h"
#include "sums.h"

#ifdef SORA_EMULATED
#define SORA_CUDA_OP(op, forward, backward) \
  SORA_RAW_OP(sora_kernels_emulated, CPU, op, "_cuda", forward, backward)
#else
#define SORA_CUDA_OP(op, forward, backward) \
  SORA_RAW_OP(sora_kernels, CUDA, op, "_cuda", forward, backward)
#endif

namespace sora::cuda {

// Makes the device of a tensor current for its own lifetime, and gives torch's stream on it.
class OnDevice {
 public:
#ifdef SORA_EMULATED
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  Stream stream() const { return stream_; }

 private:
#ifndef SORA_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

#ifdef SORA_EMULATED
// Instead of the allocation of csrc/common/tensors.h: NaN between two bands of a number that tests look for.
constexpr int64_t kBand = 64;
constexpr double kBandValue = 12288.0;

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  Tensor all = torch::stable::new_empty(like, std::vector<int64_t>{count + 2 * kBand}, type);
  torch::stable::fill_(all, kBandValue);
  Tensor inner = torch::stable::narrow(all, 0, kBand, count);
  torch::stable::fill_(inner, __builtin_nan(""));
  return torch::stable::view(inner, shape);
}
#else
using sora::empty;
#endif

// What a call needs of its device: memory like that of a tensor, and torch's stream.
class Cuda {
 public:
  explicit Cuda(const Tensor& like) : like_(like), device_(like) {}

  Tensor empty(std::vector<int64_t> shape, ScalarType type) const {
    return cuda::empty(like_, std::move(shape), type);
  }
  Stream stream() const { return device_.stream(); }

  static int width_of(const Tensor& x) {
    const int64_t width = x.size(x.dim() - 1);
    STD_TORCH_CHECK(width <= 1 << 23,  // a grid has fewer than 2^16 blocks in y
                    "sora_kernels: x: expected rows of at most 2^23, got ", width);
    return static_cast<int>(width);
  }

  // A [D] vector of any of the types, as a matrix that repeats it.
  static Matrix vector(const Optional& t, int64_t width, const char* name) {
    if (!t) return {};
    check_vector(*t, width, name);
    return {t->const_data_ptr(), 0, dtype_of(*t)};
  }

 private:
  const Tensor& like_;
  OnDevice device_;
};

// Gradients, those that are sums over tokens with what stage two needs.
class Gradients : public GradientMemory<Cuda> {
 public:
  Gradients(const Cuda& device, int64_t tokens, int64_t width, const RowMap& rows,
            bool one_token_rows)
      : GradientMemory(device, width), tokens_(tokens), rows_(rows), whole_(one_token_rows) {
    STD_TORCH_CHECK(tokens <= INT_MAX - 1024,
                    "sora_kernels: x: expected fewer than 2^31 tokens, got ", tokens);
    const int64_t size = block_tokens(tokens);
    blocks_ = tokens > 0 ? (tokens + size - 1) / size : 1;  // a null pointer means something else
  }

  Tensor modulation(bool wanted, const Optional& of, bool table, GroupedSum& sum) {
    if (!wanted || !of) return none();
    Tensor grad = new_modulation(*of, table);
    sum = {{data(grad), dtype_of(grad), whole_ ? nullptr : partial({blocks_, 2, width_})},
           rows_, of->size(0)};
    return grad;
  }

  // Of a vector [D]: fp32, over all tokens, in the order in which the rows sort them.
  Tensor vector(bool wanted, const Optional& of, GroupedSum& sum) {
    if (!wanted || !of) return none();
    Tensor grad = new_vector();
    RowMap all;
    all.order = rows_.order;
    all.tokens_per_row = tokens_ > 0 ? tokens_ : 1;
    sum = {{data(grad), DType::f32, partial({blocks_, 2, width_})}, all, 1};
    return grad;
  }

 private:
  int64_t tokens_, blocks_;
  RowMap rows_;
  bool whole_;
};

// The Device of an op with a norm, whose kernels are run_forward, run_backward and holds_row of its structs.
template <class Fwd, class Bwd>
class NormDevice : public Cuda {
 public:
  using Forward = Fwd;
  using Backward = Bwd;
  using Gradients = cuda::Gradients;
  using Cuda::Cuda;

  void forward(const Forward& a) const { run_forward(a, stream()); }

  void backward(Backward& a, const Gradients&) const {
    const bool whole = holds_row(a);
    Tensor means = empty({whole ? 0 : a.tokens, 2}, ScalarType::Float);
    a.means = whole ? nullptr : data<float>(means);
    run_backward(a, stream());
  }
};

}  // namespace sora::cuda
