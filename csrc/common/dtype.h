// Storage types of the CPU kernels. Arithmetic is always fp32; these are only loaded and stored.
// c10::BFloat16 is avoided on purpose: inside functions compiled for several instruction sets it
// was measured 270 times slower than integer shifts.
#pragma once
#include <cstdint>

namespace sora {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : int { f32, bf16, f16 };

}  // namespace sora
