// SORA_HD: an inline function that CUDA kernels may call as well. Everywhere else, the emulator of
// tests/cuda_emulator included, it is `static inline`, so that no translation unit shares its
// (instruction set specific) copy with another.
#pragma once

#ifdef __CUDACC__
#define SORA_HD static __host__ __device__ __forceinline__
#else
#define SORA_HD static inline
#endif
