// CPU binding of norm_silu: stable-ABI tensors in, block kernels on torch's thread pool, and the
// second stage of the reductions, in double and in fixed order.
#include "norm_silu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "bind.h"

namespace sora {
namespace {

Regions regions_of(const Tensor& t, bool last, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "sora_kernels: ", name, ": expected 4 dimensions, got ", t.dim());
  const int unit = last ? 3 : 2;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(unit) == 1 || t.stride(unit) == 1, "sora_kernels: ",
                  name, ": expected stride 1 in dimension ", unit);
  Regions r{t.const_data_ptr(), {}};
  for (int d = 0; d < 4; ++d) r.stride[d] = t.stride(d);
  r.stride[unit] = 1;
  return r;
}

// [B, F, L, C] where channels come last, [B, C, F, L] where they come first.
Tensor allocate(const Tensor& x, bool last, Regions& regions) {
  const int64_t b = x.size(0), f = x.size(1), l = x.size(2), c = x.size(3);
  Tensor t = empty(x, last ? std::vector<int64_t>{b, f, l, c} : std::vector<int64_t>{b, c, f, l},
                   x.scalar_type());
  const int64_t strides[2][4] = {{c * f * l, l, 1, f * l}, {f * l * c, l * c, c, 1}};
  for (int d = 0; d < 4; ++d) regions.stride[d] = strides[last][d];
  regions.data = data(t);
  return t;
}

// Positions of a block. Where channels come first, a block is stretches of memory as long as the
// cache of a core allows.
int64_t block_of(int64_t width, int64_t groups, bool last) {
  if (last) return kNormSiluBlock;
  if (groups > 0) return kNormSiluLongBlock;
  const int64_t positions = kNormSiluCached / (width + 1) / kNormSiluBlock * kNormSiluBlock;
  return std::clamp(positions, kNormSiluBlock, 8 * kNormSiluBlock);
}

void fill(Cpu& device, NormSilu& a, const Tensor& x, const Optional& weight, const Optional& bias,
          int64_t groups, double floor, bool silu, bool last) {
  a.x = regions_of(x, last, "x");
  a.type = dtype_of(x);
  a.frames = x.size(1);
  a.regions = x.size(0) * x.size(1);
  a.length = x.size(2);
  a.width = x.size(3);
  a.block = block_of(a.width, groups, last);
  a.blocks = (a.length + a.block - 1) / a.block;
  a.groups = groups;
  STD_TORCH_CHECK(groups >= 0 && (groups == 0 || a.width % groups == 0),
                  "sora_kernels: groups: expected a divisor of ", a.width, ", got ", groups);
  a.last = last;
  a.silu = silu;
  a.floor = static_cast<float>(floor);
  a.weight = weight ? device.vector(weight, a.width, "weight") : device.constant(a.width, 1.0f);
  a.bias = bias ? device.vector(bias, a.width, "bias") : device.constant(a.width, 0.0f);
  a.stream = past_cache(x);
}

template <class Body>
void for_blocks(const NormSilu& a, Body&& body) {
  const int64_t grain = 1 + 16384 / (a.block * a.width + 1);
  torch::stable::parallel_for(0, a.regions * a.blocks, grain, body);
}

int64_t positions_of(const NormSilu& a, int64_t block) {
  const int64_t rest = a.length - block * a.block;
  return rest < a.block ? rest : a.block;
}

// GroupNorm in channels first layout can be done group by group if there are enough groups for all
// threads: what the second pass reads is then in the cache, as far as it fits. Both ways give the
// same bits.
bool group_by_group(const NormSilu& a) {
  return !a.last && a.regions * a.groups >= 2 * static_cast<int64_t>(torch::stable::get_num_threads());
}

// Calls body(region, group) for all of them.
template <class Body>
void for_groups(const NormSilu& a, Body&& body) {
  torch::stable::parallel_for(0, a.regions * a.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) body(unit / a.groups, unit % a.groups);
  });
}

NormSiluPart part_of(const NormSilu& a, int64_t region, int64_t group) {
  const int64_t size = a.width / a.groups;
  return {region, 0, a.blocks, group * size, (group + 1) * size};
}

// Calls body(part) for blocks of all channels.
template <class Body>
void for_parts(const NormSilu& a, Body&& body) {
  for_blocks(a, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t region = begin / a.blocks, first = region * a.blocks;
      const int64_t stop = std::min(end, first + a.blocks);
      body(NormSiluPart{region, begin - first, stop - first, 0, a.width});
      begin = stop;
    }
  });
}

// Statistics of a group from those of its channels in every block (Chan, Golub, LeVeque 1979).
void merge_stats(const NormSiluFwd& a, int64_t region, int64_t group) {
  const NormSiluPart part = part_of(a, region, group);
  const double count = static_cast<double>(a.length * (part.channel_end - part.channel));
  double mean = 0, m2 = 0;
  for (int64_t k = 0; k < a.blocks; ++k) {
    const float* block = a.block_mean + (region * a.blocks + k) * a.width;
    double total = 0;
    for (int64_t c = part.channel; c < part.channel_end; ++c) total += block[c];
    mean += total * static_cast<double>(positions_of(a, k));
  }
  mean /= count;
  for (int64_t k = 0; k < a.blocks; ++k) {
    const int64_t row = (region * a.blocks + k) * a.width;
    for (int64_t c = part.channel; c < part.channel_end; ++c) {
      const double apart = a.block_mean[row + c] - mean;
      m2 += a.block_m2[row + c] + apart * apart * static_cast<double>(positions_of(a, k));
    }
  }
  a.mean[region * a.groups + group] = static_cast<float>(mean);
  a.rstd[region * a.groups + group] = static_cast<float>(1.0 / std::sqrt(m2 / count + a.eps));
}

void group_forward(const NormSiluFwd& a) {
  auto stats = [&](const NormSiluPart& p) { SORA_CALL_KERNEL_BF16(norm_silu_group_stats, a, p); };
  auto apply = [&](const NormSiluPart& p) { SORA_CALL_KERNEL_BF16(norm_silu_group_fwd, a, p); };
  if (group_by_group(a)) {
    for_groups(a, [&](int64_t region, int64_t group) {
      const NormSiluPart part = part_of(a, region, group);
      stats(part);
      merge_stats(a, region, group);
      apply(part);
    });
  } else {
    for_parts(a, stats);
    for_groups(a, [&](int64_t region, int64_t group) { merge_stats(a, region, group); });
    for_parts(a, apply);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias,
                                           int64_t groups, double eps, double floor, bool silu,
                                           bool channels_last) {
  NormSiluFwd a{};
  Cpu device(x);
  fill(device, a, x, weight, bias, groups, floor, silu, channels_last);
  a.eps = static_cast<float>(eps);
  Tensor y = allocate(x, channels_last, a.out);
  Tensor mean = empty(x, {groups ? a.regions * groups : 0}, ScalarType::Float);
  Tensor rstd = empty(x, {a.regions * (groups ? groups : a.length)}, ScalarType::Float);
  a.mean = data<float>(mean);
  a.rstd = data<float>(rstd);
  if (groups == 0) {
    for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL_BF16(norm_silu_rms_fwd, a, b, e); });
    return {y, mean, rstd};
  }
  Tensor partial = empty(x, {2, a.regions * a.blocks, a.width}, ScalarType::Float);
  a.block_mean = data<float>(partial);
  a.block_m2 = a.block_mean + a.regions * a.blocks * a.width;
  group_forward(a);
  return {y, mean, rstd};
}

// Column sums of partial [R, blocks, C] over the blocks of every region, and of those over regions.
void sum_blocks(const NormSilu& a, const float* partial, float* total) {
  constexpr int64_t columns = 64;
  torch::stable::parallel_for(
      0, (a.width + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t first = chunk * columns;
          const int64_t n = a.width - first < columns ? a.width - first : columns;
          double all[columns] = {};
          for (int64_t region = 0; region < a.regions; ++region) {
            double sum[columns] = {};
            for (int64_t k = 0; k < a.blocks; ++k) {
              const float* row = partial + (region * a.blocks + k) * a.width + first;
              for (int64_t c = 0; c < n; ++c) sum[c] += row[c];
            }
            for (int64_t c = 0; c < n; ++c) all[c] += sum[c];
          }
          for (int64_t c = 0; c < n; ++c) total[first + c] = static_cast<float>(all[c]);
        }
      });
}

// c1 and c2 of a group from the sums of its channels in every block.
void merge_sums(const NormSiluBwd& a, int64_t region, int64_t group) {
  const NormSiluPart part = part_of(a, region, group);
  const double count = static_cast<double>(a.length * (part.channel_end - part.channel));
  double s1 = 0, s2 = 0;
  for (int64_t k = 0; k < a.blocks; ++k) {
    const int64_t row = (region * a.blocks + k) * a.width;
    for (int64_t c = part.channel; c < part.channel_end; ++c) {
      s1 += static_cast<double>(a.weight[c]) * a.sum_du[row + c];
      s2 += static_cast<double>(a.weight[c]) * a.sum_duxhat[row + c];
    }
  }
  a.c1[region * a.groups + group] = static_cast<float>(s1 / count);
  a.c2[region * a.groups + group] = static_cast<float>(s2 / count);
}

void group_backward(const NormSiluBwd& a) {
  auto sums = [&](const NormSiluPart& p) { SORA_CALL_KERNEL_BF16(norm_silu_group_sums, a, p); };
  auto apply = [&](const NormSiluPart& p) { SORA_CALL_KERNEL_BF16(norm_silu_group_bwd, a, p); };
  if (!a.out.data) {
    for_parts(a, sums);
  } else if (group_by_group(a)) {
    for_groups(a, [&](int64_t region, int64_t group) {
      const NormSiluPart part = part_of(a, region, group);
      sums(part);
      merge_sums(a, region, group);
      apply(part);
    });
  } else {
    for_parts(a, sums);
    for_groups(a, [&](int64_t region, int64_t group) { merge_sums(a, region, group); });
    for_parts(a, apply);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                            Optional weight, Optional bias, int64_t groups,
                                            double floor, bool silu, bool channels_last,
                                            int64_t needs) {
  NormSiluBwd a{};
  Cpu device(x);
  fill(device, a, x, weight, bias, groups, floor, silu, channels_last);
  a.dy = regions_of(dy, channels_last, "dy");
  bool same = dtype_of(dy) == a.type;
  for (int d = 0; d < 4; ++d) same &= dy.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "sora_kernels: dy: expected the dtype and shape of x");
  a.mean = data<float>(mean);
  a.rstd = data<float>(rstd);
  auto none = [&] { return empty(x, {0}, ScalarType::Float); };  // outputs must not alias
  Tensor dx = none(), dweight = none(), dbias = none();
  if (needs & 1) dx = allocate(x, channels_last, a.out);
  if (needs & 2) dweight = empty(x, {a.width}, ScalarType::Float);
  if (needs & 4) dbias = empty(x, {a.width}, ScalarType::Float);
  const int64_t size = a.regions * a.blocks * a.width;
  Tensor partial = empty(x, {needs != 1 || groups ? 2 * size : 0}, ScalarType::Float);
  float* sums = data<float>(partial);
  if (needs & 4 || groups) a.sum_du = sums;
  if (needs & 2 || groups) a.sum_duxhat = sums + size;

  std::vector<float> means(2 * a.regions * groups);
  a.c1 = means.data();
  a.c2 = a.c1 + a.regions * groups;
  if (groups == 0) {
    for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL_BF16(norm_silu_rms_bwd, a, b, e); });
  } else {
    group_backward(a);
  }
  if (needs & 4) sum_blocks(a, a.sum_du, data<float>(dbias));
  if (needs & 2) sum_blocks(a, a.sum_duxhat, data<float>(dweight));
  return {dx, dweight, dbias};
}

}  // namespace

SORA_CPU_OP(norm_silu, forward, backward)

}  // namespace sora
