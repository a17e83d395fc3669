// Run-time choice of the instruction set. Kernel files are compiled once per instruction set, each
// into its own namespace; SORA_DECLARE_KERNEL declares all versions, SORA_CALL_KERNEL runs one. The
// last instruction set only adds a conversion from fp32 to bf16: files that gain from it (BF16_KERNELS
// in setup.py) use the macros that end in _BF16.
#pragma once

namespace sora {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

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
    case ::sora::Isa::avx512_bf16:                                      \
    case ::sora::Isa::avx512: ::sora::avx512::name(__VA_ARGS__); break; \
    case ::sora::Isa::avx2: ::sora::avx2::name(__VA_ARGS__); break;     \
    default: ::sora::baseline::name(__VA_ARGS__);                       \
  }
#define SORA_DECLARE_KERNEL_BF16(signature) \
  SORA_DECLARE_KERNEL(signature)            \
  namespace sora::avx512_bf16 { void signature; }
#define SORA_CALL_KERNEL_BF16(name, ...)                                      \
  if (::sora::isa() == ::sora::Isa::avx512_bf16) {                            \
    ::sora::avx512_bf16::name(__VA_ARGS__);                                   \
  } else {                                                                    \
    SORA_CALL_KERNEL(name, __VA_ARGS__)                                       \
  }
#else
#define SORA_DECLARE_KERNEL(signature) \
  namespace sora::baseline { void signature; }
#define SORA_CALL_KERNEL(name, ...) ::sora::baseline::name(__VA_ARGS__)
#define SORA_DECLARE_KERNEL_BF16 SORA_DECLARE_KERNEL
#define SORA_CALL_KERNEL_BF16 SORA_CALL_KERNEL
#endif
