// CPU binding of guided_step: stable-ABI tensors in, row kernels on torch's thread pool.
#include "guided_step.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

const float* per_row(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.scalar_type() == ScalarType::Float,
                  "sora_kernels: ", name, ": expected a contiguous float32 vector");
  return static_cast<const float*>(t.const_data_ptr());
}

void fill(GuidedStep& a, const Tensor& x, const Tensor& guidance, const Tensor& weight,
          const Optional& index, int64_t tokens_per_row) {
  a.width = x.size(2);
  a.tokens = x.size(0) * x.size(1);
  a.guidance = per_row(guidance, "guidance");
  a.weight = per_row(weight, "weight");
  a.rows = rows_of(index, std::nullopt, std::nullopt, tokens_per_row);
}

void check_like(const Tensor& x, const Tokens& v, const Tensor& given, const char* name) {
  STD_TORCH_CHECK(given.size(0) == x.size(0) && given.size(1) == x.size(1) &&
                      given.size(2) == x.size(2) &&
                      (v.type == dtype_of(x) || dtype_of(x) == DType::f32),
                  "sora_kernels: ", name,
                  ": expected the shape and dtype of x, or a half precision beside float32");
}

Tensor forward(Tensor x, Tensor cond, Optional uncond, Tensor guidance, Tensor weight,
               Optional index, int64_t tokens_per_row) {
  GuidedStepFwd a{};
  fill(a, x, guidance, weight, index, tokens_per_row);
  a.x = tokens_of(x, "x");
  a.cond = tokens_of(cond, "cond");
  check_like(x, a.cond, cond, "cond");
  if (uncond) {
    a.uncond = tokens_of(*uncond, "uncond");
    check_like(x, a.uncond, *uncond, "uncond");
    STD_TORCH_CHECK(a.uncond.type == a.cond.type,
                    "sora_kernels: uncond: expected the dtype of cond");
  }
  Tensor out = empty(x, {x.size(0), x.size(1), a.width}, x.scalar_type());
  a.out = data(out);
  a.stream = past_cache(out);
  torch::stable::parallel_for(0, a.tokens, token_grain(a.width), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(guided_step_fwd, a, b, e);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor guidance, Tensor weight, Optional index,
                                    int64_t tokens_per_row, ScalarType dtype, bool guided,
                                    int64_t needs) {
  GuidedStepBwd a{};
  fill(a, dout, guidance, weight, index, tokens_per_row);
  a.dout = tokens_of(dout, "dout");
  a.type = dtype_of(dtype);
  a.guided = guided;
  STD_TORCH_CHECK(a.type == a.dout.type || a.dout.type == DType::f32,
                  "sora_kernels: dtype: expected that of dout, or a half precision beside float32");
  auto grad = [&](bool wanted) {
    return wanted ? empty(dout, {dout.size(0), dout.size(1), a.width}, dtype)
                  : empty(dout, {0}, dtype);
  };
  Tensor dcond = grad(needs & 1), duncond = grad(needs & 2);
  a.dcond = needs & 1 ? data(dcond) : nullptr;
  a.duncond = needs & 2 ? data(duncond) : nullptr;
  a.stream = past_cache(a.tokens * a.width, a.type);
  torch::stable::parallel_for(0, a.tokens, token_grain(a.width), [&](int64_t b, int64_t e) {
    SORA_CALL_KERNEL_BF16(guided_step_bwd, a, b, e);
  });
  return {dcond, duncond};
}

}  // namespace

SORA_CPU_OP(guided_step, forward, backward)

}  // namespace sora
