// Helpers of the bindings: stable-ABI tensors to the plain structs that kernels take. Shapes and
// dtypes were checked by the public Python functions; what is checked here protects raw calls.
#pragma once
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"

namespace sora {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

inline DType dtype_of(ScalarType type) {
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::BFloat16) return DType::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half,
                  "sora_kernels: expected float32, bfloat16 or float16 tensors");
  return DType::f16;
}
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

inline void check_unit_stride(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1,
                  "sora_kernels: ", name, ": expected stride 1 in the last dimension, got ",
                  t.stride(t.dim() - 1));
}

// [B, L, D] -> N = B * L tokens.
inline Tokens tokens_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, "sora_kernels: ", name, ": expected 3 dimensions, got ", t.dim());
  check_unit_stride(t, name);
  return {t.const_data_ptr(), t.size(1) > 0 ? t.size(1) : 1, t.stride(0), t.stride(1), dtype_of(t)};
}

// [R, D], or nothing.
inline Matrix matrix_of(const Optional& t, int64_t width, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == width, "sora_kernels: ", name,
                  ": expected shape [R, ", width, "]");
  check_unit_stride(*t, name);
  return {t->const_data_ptr(), t->stride(0), dtype_of(*t)};
}

// A [D] vector as fp32: the tensor's own memory, or a converted copy kept in `keep`.
inline const float* vector_of(const Optional& t, int64_t width, const char* name,
                              std::vector<std::vector<float>>& keep) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == width, "sora_kernels: ", name,
                  ": expected shape [", width, "]");
  check_unit_stride(*t, name);
  const DType type = dtype_of(*t);
  if (type == DType::f32) return static_cast<const float*>(t->const_data_ptr());
  keep.emplace_back(width);
  for (int64_t d = 0; d < width; ++d) {
    if (type == DType::bf16) {
      keep.back()[d] = static_cast<float>(t->const_data_ptr<torch::headeronly::BFloat16>()[d]);
    } else {
      keep.back()[d] = static_cast<float>(t->const_data_ptr<torch::headeronly::Half>()[d]);
    }
  }
  return keep.back().data();
}

inline const int32_t* ints_of(const Optional& t, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(), "sora_kernels: ", name,
                  ": expected a contiguous int32 tensor");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

inline RowMap rows_of(const Optional& index, const Optional& order, const Optional& offsets,
                      int64_t tokens_per_row) {
  RowMap map;
  map.index = ints_of(index, "index");
  map.order = ints_of(order, "order");
  map.offsets = ints_of(offsets, "offsets");
  map.tokens_per_row = tokens_per_row > 0 ? tokens_per_row : 1;
  return map;
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

template <class T = void>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Outputs larger than this are written past the cache: they will not be found there again.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

}  // namespace sora
