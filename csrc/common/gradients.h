// What the bindings of CPU and CUDA share of the memory for gradients.
#pragma once
#include <utility>

#include "tensors.h"

namespace sora {

// Gradients of tokens and of modulations, and partial sums, which live until stage two has run.
template <class Device>
class GradientMemory {
 public:
  Tensor none() const { return device_.empty({0}, ScalarType::Float); }  // outputs must not alias

  Tensor tokens(bool wanted, const Tensor& like, ScalarType type, void*& result) const {
    if (!wanted) return none();
    Tensor grad = device_.empty(shape_of(like), type);
    result = data(grad);
    return grad;
  }

 protected:
  GradientMemory(const Device& device, int64_t width) : device_(device), width_(width) {}

  // Of a modulation [R, D]. One that is summed further, over rows (for its table), stays fp32.
  Tensor new_modulation(const Tensor& of, bool table) const {
    return device_.empty({of.size(0), width_}, table ? ScalarType::Float : of.scalar_type());
  }
  Tensor new_vector() const { return device_.empty({width_}, ScalarType::Float); }
  float* partial(std::vector<int64_t> shape) {
    partials_.push_back(device_.empty(std::move(shape), ScalarType::Float));
    return data<float>(partials_.back());
  }

  const Device& device_;
  int64_t width_;

 private:
  std::vector<Tensor> partials_;
};

}  // namespace sora
