// What the raw ops with a norm and a modulation share, from stable-ABI tensors to the struct of a call, for
// any Device: Cpu of csrc/cpu/bind.h, Cuda of csrc/cuda/bind.h.
#pragma once
#include <tuple>

#include "tensors.h"

namespace sora {

struct NormParameters {
  const Optional &weight, &bias, &shift_table, &scale_table;
};

template <class Device, class Args>
void fill_norm(Device& device, Args& a, const Tensor& x, const NormParameters& p, DType out_type,
               int64_t law) {
  a.x = tokens_of(x, "x");
  a.width = device.width_of(x);
  a.tokens = x.size(0) * x.size(1);
  a.weight = device.vector(p.weight, a.width, "weight");
  a.bias = device.vector(p.bias, a.width, "bias");
  a.shift_table = device.vector(p.shift_table, a.width, "shift_table");
  a.scale_table = device.vector(p.scale_table, a.width, "scale_table");
  a.out_type = out_type;
  a.law = static_cast<int>(law);
}

// The mean (of no elements for RMS, which the kernels see as null) and 1 / deviation of every token.
struct Statistics {
  Tensor mean, rstd;

  template <class Args>
  void attach(Args& a, bool rms) {
    a.mean = rms ? nullptr : data<float>(mean);
    a.rstd = data<float>(rstd);
  }
};

template <class Device, class Args>
Statistics new_statistics(Device& device, Args& a, bool rms) {
  Statistics s{device.empty({rms ? 0 : a.tokens}, ScalarType::Float),
               device.empty({a.tokens}, ScalarType::Float)};
  s.attach(a, rms);
  return s;
}

}  // namespace sora
