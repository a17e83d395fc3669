// CPU binding of causal_conv_pad: stable-ABI tensors in, copies on torch's thread pool.
#include "causal_conv_pad.h"

#include <tuple>

#include "bind.h"

namespace sora {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // less than this is not worth a second thread

Frames frames_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 6, "sora_kernels: ", name, ": expected 6 dimensions, got ", t.dim());
  Frames f;
  f.data = static_cast<const char*>(t.const_data_ptr());
  const int64_t element = static_cast<int64_t>(t.element_size());
  for (int d = 0; d < 6; ++d) f.stride[d] = t.stride(d) * element;
  const int64_t height = t.size(3), width = t.size(4), inner = t.size(5);
  f.dense_row = (inner == 1 || t.stride(5) == 1) && (width == 1 || t.stride(4) == inner);
  f.dense_frame = f.dense_row && (height == 1 || t.stride(3) == inner * width);
  return f;
}

void check_pads(int64_t pad_t, int64_t top, int64_t bottom, int64_t left, int64_t right,
                int64_t cache_frames) {
  STD_TORCH_CHECK(top >= 0 && bottom >= 0 && left >= 0 && right >= 0 && cache_frames >= 0 &&
                      pad_t >= cache_frames,
                  "sora_kernels: causal_conv_pad: expected pads >= 0 and at most pad_t = ", pad_t,
                  " cache frames, got ", cache_frames);
}

std::tuple<Tensor, Tensor> forward(Tensor x, Optional cache, int64_t pad_t, int64_t top,
                                   int64_t bottom, int64_t left, int64_t right, bool replicate,
                                   int64_t keep) {
  CausalConvPadFwd a{};
  dtype_of(x);
  a.x = frames_of(x, "x");
  a.outer = x.size(1);
  a.planes = x.size(0) * x.size(1);
  a.frames = x.size(2);
  a.height = x.size(3);
  a.width = x.size(4);
  a.inner = x.size(5);
  a.element = static_cast<int64_t>(x.element_size());
  if (cache) {
    a.cache = frames_of(*cache, "cache");
    a.cache_frames = cache->size(2);
    bool same = dtype_of(*cache) == dtype_of(x);
    for (int d : {0, 1, 3, 4, 5}) same &= cache->size(d) == x.size(d);
    STD_TORCH_CHECK(same, "sora_kernels: cache: expected the dtype and shape of x except frames");
  }
  check_pads(pad_t, top, bottom, left, right, a.cache_frames);
  a.fill = pad_t - a.cache_frames;
  a.top = top;
  a.bottom = bottom;
  a.left = left;
  a.right = right;
  a.keep = keep;
  a.replicate = replicate;
  STD_TORCH_CHECK(keep >= 0 && keep <= a.padded_frames() && a.frames > 0,
                  "sora_kernels: keep: expected 0 to ", a.padded_frames(), ", got ", keep);
  Tensor padded = empty(x, {x.size(0), x.size(1), a.padded_frames(), a.padded_height(),
                            left + a.width + right, a.inner}, x.scalar_type());
  Tensor kept = empty(x, {x.size(0), x.size(1), keep, a.height, a.width, a.inner},
                      x.scalar_type());
  a.padded = data<char>(padded);
  a.kept = data<char>(kept);
  a.stream = static_cast<int64_t>(padded.numel()) * a.element >= kStreamBytes;
  const int64_t rows = a.planes * a.padded_frames() * a.padded_height();
  torch::stable::parallel_for(0, rows, 1 + kGrainBytes / (a.row_bytes() + 1),
                              [&](int64_t b, int64_t e) {
                                SORA_CALL_KERNEL(causal_conv_pad_fwd, a, b, e);
                              });
  return {padded, kept};
}

std::tuple<Tensor, Tensor> backward(Tensor dpadded, Tensor dkept, int64_t cache_frames,
                                    int64_t pad_t, int64_t top, int64_t bottom, int64_t left,
                                    int64_t right, bool replicate, int64_t needs) {
  CausalConvPadBwd a{};
  a.type = dtype_of(dpadded);
  a.dpadded = frames_of(dpadded, "dpadded");
  a.dkept = frames_of(dkept, "dkept");
  check_pads(pad_t, top, bottom, left, right, cache_frames);
  a.outer = dpadded.size(1);
  a.planes = dpadded.size(0) * dpadded.size(1);
  a.frames = dpadded.size(2) - pad_t;
  a.height = dpadded.size(3) - top - bottom;
  a.width = dpadded.size(4) - left - right;
  a.inner = dpadded.size(5);
  a.element = static_cast<int64_t>(dpadded.element_size());
  a.cache_frames = cache_frames;
  a.fill = pad_t - cache_frames;
  a.top = top;
  a.bottom = bottom;
  a.left = left;
  a.right = right;
  a.keep = dkept.size(2);
  a.replicate = replicate;
  STD_TORCH_CHECK(a.frames > 0 && a.height >= 0 && a.width >= 0 && a.keep <= a.padded_frames() &&
                      dtype_of(dkept) == a.type && dkept.size(0) == dpadded.size(0) &&
                      dkept.size(1) == a.outer && dkept.size(3) == a.height &&
                      dkept.size(4) == a.width && dkept.size(5) == a.inner,
                  "sora_kernels: dkept: expected the dtype and shape of unpadded dpadded");
  auto run = [&](bool wanted, int64_t first, int64_t count) {
    Tensor grad = empty(dpadded, wanted ? std::vector<int64_t>{dpadded.size(0), a.outer, count,
                                                               a.height, a.width, a.inner}
                                        : std::vector<int64_t>{0},
                        dpadded.scalar_type());
    if (!wanted) return grad;
    a.grad = data<char>(grad);
    a.first = first;
    a.count = count;
    a.stream = static_cast<int64_t>(grad.numel()) * a.element >= kStreamBytes;
    torch::stable::parallel_for(0, a.planes * count * a.height,
                                1 + kGrainBytes / (a.row_bytes() + 1), [&](int64_t b, int64_t e) {
                                  SORA_CALL_KERNEL(causal_conv_pad_bwd, a, b, e);
                                });
    return grad;
  };
  Tensor dx = run(needs & 1, cache_frames, a.frames);
  Tensor dcache = run(needs & 2, 0, cache_frames);
  return {dx, dcache};
}

}  // namespace

SORA_CPU_OP(causal_conv_pad, forward, backward)

}  // namespace sora
