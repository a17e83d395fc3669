// Half precision of the emulator: GCC's _Float16 rounds to nearest even, as the GPU does.
#pragma once
#include <cstring>

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) {
  _Float16 v;
  std::memcpy(&v, &h.bits, sizeof v);
  return static_cast<float>(v);
}
inline __half __float2half_rn(float v) {
  const _Float16 narrow = static_cast<_Float16>(v);
  __half h;
  std::memcpy(&h.bits, &narrow, sizeof narrow);
  return h;
}
