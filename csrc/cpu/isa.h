// Run-time choice of the instruction set. Kernel files are compiled once per instruction set, each
// into its own namespace; SORA_DECLARE_KERNEL declares all versions, SORA_CALL_KERNEL runs one.
#pragma once

namespace sora {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this build contains and this machine has. The environment variable
// SORA_KERNELS_ISA=baseline|avx2|avx512 lowers it (read once), which is how tests reach all of them.
Isa isa();

}  // namespace sora

#ifdef SORA_X86
#define SORA_DECLARE_KERNEL(signature)          \
  namespace sora::baseline { void signature; }  \
  namespace sora::avx2 { void signature; }      \
  namespace sora::avx512 { void signature; }
#define SORA_CALL_KERNEL(name, ...)                                   \
  switch (::sora::isa()) {                                            \
    case ::sora::Isa::avx512: ::sora::avx512::name(__VA_ARGS__); break; \
    case ::sora::Isa::avx2: ::sora::avx2::name(__VA_ARGS__); break;     \
    default: ::sora::baseline::name(__VA_ARGS__);                       \
  }
#else
#define SORA_DECLARE_KERNEL(signature) \
  namespace sora::baseline { void signature; }
#define SORA_CALL_KERNEL(name, ...) ::sora::baseline::name(__VA_ARGS__)
#endif
