// Rounding points; the values are those of sora_kernels/laws.py (a test compares them).
#pragma once

namespace sora {

enum Point : int {
  kXhat = 1,
  kAffine = 2,
  kTable = 4,
  kOnePlus = 8,
  kProduct = 16,
  kSum = 32,
  kTanh = 64,
  kGated = 128,
  kResidual = 256,
  kPreRope = 512,
  kRope = 1024,
};

}  // namespace sora
