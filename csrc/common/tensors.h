// Helpers of the bindings of CPU and CUDA: stable-ABI tensors to the plain structs that kernels take,
// and the registration of raw ops. Shapes and dtypes were checked by the public Python functions; what
// is checked here protects raw calls.
#pragma once
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "rows.h"
#include "schemas.h"

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

// Tokens before a stride other than that from one token to the next: L of [B, L, ...], or all where
// batches follow each other, which spares kernels a division.
inline int64_t tokens_per_batch(const Tensor& t) {
  const bool one_run = t.size(0) == 1 || t.stride(0) == t.size(1) * t.stride(1);
  return std::max<int64_t>(one_run ? t.size(0) * t.size(1) : t.size(1), 1);
}

// [B, L, D] -> N = B * L tokens.
inline Tokens tokens_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, "sora_kernels: ", name, ": expected 3 dimensions, got ", t.dim());
  check_unit_stride(t, name);
  return {t.const_data_ptr(), tokens_per_batch(t), t.stride(0), t.stride(1), dtype_of(t)};
}

// [R, D], or nothing.
inline Matrix matrix_of(const Optional& t, int64_t width, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == width, "sora_kernels: ", name,
                  ": expected shape [R, ", width, "]");
  check_unit_stride(*t, name);
  return {t->const_data_ptr(), t->stride(0), dtype_of(*t)};
}

// A [D] vector.
inline void check_vector(const Tensor& t, int64_t width, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == width, "sora_kernels: ", name, ": expected shape [",
                  width, "]");
  check_unit_stride(t, name);
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

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

// <op>_fwd<suffix> and <op>_bwd<suffix>. The library brings the schemas of what it implements, so that
// it serves a process without Python; the Python side compares them with its own.
inline void define(torch::stable::detail::StableLibrary& m, const Schemas& op,
                   const std::string& suffix) {
  m.def((op.name + ("_fwd" + suffix) + op.forward).c_str());
  m.def((op.name + ("_bwd" + suffix) + op.backward).c_str());
}

}  // namespace sora

#define SORA_RAW_OP(library, key, op, suffix, forward, backward)                                 \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) { ::sora::define(m, ::sora::schemas::op, suffix); } \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                                   \
    m.impl(#op "_fwd" suffix, TORCH_BOX(&forward));                                              \
    m.impl(#op "_bwd" suffix, TORCH_BOX(&backward));                                             \
  }
