// Helpers of the CUDA bindings, on top of those of the CPU: stable-ABI tensors to the plain structs
// that kernels take. No CUDA headers here, so bindings are compiled by the C++ compiler.
//
// The emulator of tests/cuda_emulator compiles the same bindings for the CPU dispatch key of a library
// of its own: SORA_EMULATED.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "../cpu/bind.h"
#include "sums.h"

#ifdef SORA_EMULATED
#define SORA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sora_kernels_emulated, CPU, m)
#else
#define SORA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CUDA, m)
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
// Instead of the allocation of csrc/cpu/bind.h: NaN between two bands of a number that tests look for.
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

inline int width_of(const Tensor& x) {
  STD_TORCH_CHECK(x.size(x.dim() - 1) < INT_MAX / 2,
                  "sora_kernels: x: expected rows of less than 2^30, got ", x.size(x.dim() - 1));
  return static_cast<int>(x.size(x.dim() - 1));
}

// A [D] vector of any of the types, as a matrix that repeats it.
inline Matrix vector_of(const Optional& t, int64_t width, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == width, "sora_kernels: ", name,
                  ": expected shape [", width, "]");
  check_unit_stride(*t, name);
  return {t->const_data_ptr(), 0, dtype_of(*t)};
}

// Memory for gradients that are grouped sums, and for their partial sums until stage two has run.
class Gradients {
 public:
  Gradients(const Tensor& like, int64_t tokens, int64_t width, const RowMap& rows,
            bool one_token_rows)
      : like_(like), tokens_(tokens), width_(width), rows_(rows), whole_(one_token_rows) {
    const int64_t size = block_tokens(tokens);
    blocks_ = tokens > 0 ? (tokens + size - 1) / size : 1;  // a null pointer means something else
  }

  Tensor none() const { return empty(like_, {0}, ScalarType::Float); }  // outputs must not alias

  // Of a modulation [R, D]. One that is summed further, over rows (for its table), stays fp32.
  Tensor modulation(bool wanted, const Optional& of, bool table, GroupedSum& sum) {
    if (!wanted || !of) return none();
    Tensor grad =
        empty(like_, {of->size(0), width_}, table ? ScalarType::Float : of->scalar_type());
    sum = {{data(grad), dtype_of(grad), whole_ ? nullptr : partial()}, rows_, of->size(0)};
    return grad;
  }

  // Of a vector [D]: fp32, over all tokens, in the order in which the rows sort them.
  Tensor vector(bool wanted, const Optional& of, GroupedSum& sum) {
    if (!wanted || !of) return none();
    Tensor grad = empty(like_, {width_}, ScalarType::Float);
    RowMap all;
    all.order = rows_.order;
    all.tokens_per_row = tokens_ > 0 ? tokens_ : 1;
    sum = {{data(grad), DType::f32, partial()}, all, 1};
    return grad;
  }

 private:
  float* partial() {
    partials_.push_back(empty(like_, {blocks_, 2, width_}, ScalarType::Float));
    return data<float>(partials_.back());
  }

  const Tensor& like_;
  int64_t tokens_, width_, blocks_;
  RowMap rows_;
  bool whole_;
  std::vector<Tensor> partials_;
};

}  // namespace sora::cuda
