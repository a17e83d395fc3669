#include "isa.h"

#include <cstdlib>
#include <cstring>

#include <torch/csrc/stable/library.h>

namespace sora {
namespace {

Isa detect() {
#ifdef SORA_X86
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
  if (best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::avx512_bf16;
  if (const char* wish = std::getenv("SORA_KERNELS_ISA")) {
    if (!std::strcmp(wish, "baseline")) best = Isa::baseline;
    if (!std::strcmp(wish, "avx2") && best != Isa::baseline) best = Isa::avx2;
    if (!std::strcmp(wish, "avx512") && best == Isa::avx512_bf16) best = Isa::avx512;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

STABLE_TORCH_LIBRARY_FRAGMENT(sora_kernels, m) {
  m.def("cpu_isa() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace sora
