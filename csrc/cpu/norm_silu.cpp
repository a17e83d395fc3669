// CPU binding of norm_silu: stable-ABI tensors in, block kernels on torch's thread pool, and the
// second stage of the reductions, in double and in fixed order.
#include "norm_silu.h"

#include <cmath>
#include <tuple>

#include "bind.h"

namespace sora {
namespace {

// A [C] vector as fp32, or a constant if there is none; kept in `keep`.
const float* channels_of(const Optional& t, int64_t width, float otherwise, const char* name,
                         std::vector<std::vector<float>>& keep) {
  if (t) return vector_of(t, width, name, keep);
  keep.emplace_back(width, otherwise);
  return keep.back().data();
}

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

void fill(NormSilu& a, const Tensor& x, const Optional& weight, const Optional& bias,
          int64_t groups, double floor, bool silu, bool last,
          std::vector<std::vector<float>>& keep) {
  keep.reserve(4);
  a.x = regions_of(x, last, "x");
  a.type = dtype_of(x);
  a.frames = x.size(1);
  a.regions = x.size(0) * x.size(1);
  a.length = x.size(2);
  a.width = x.size(3);
  a.block = groups > 0 && !last ? kNormSiluLongBlock : kNormSiluBlock;
  a.blocks = (a.length + a.block - 1) / a.block;
  a.groups = groups;
  STD_TORCH_CHECK(groups >= 0 && (groups == 0 || a.width % groups == 0),
                  "sora_kernels: groups: expected a divisor of ", a.width, ", got ", groups);
  a.last = last;
  a.silu = silu;
  a.floor = static_cast<float>(floor);
  a.weight = channels_of(weight, a.width, 1.0f, "weight", keep);
  a.bias = channels_of(bias, a.width, 0.0f, "bias", keep);
  a.stream = static_cast<int64_t>(x.numel() * x.element_size()) >= kStreamBytes;
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

// Statistics of every group from those of its channels in every block (Chan, Golub, LeVeque 1979).
void merge_stats(const NormSiluFwd& a) {
  const int64_t size = a.width / a.groups;
  torch::stable::parallel_for(0, a.regions * a.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t region = unit / a.groups, first = unit % a.groups * size;
      const double count = static_cast<double>(a.length * size);
      double mean = 0, m2 = 0;
      for (int64_t k = 0; k < a.blocks; ++k) {
        const float* block = a.block_mean + (region * a.blocks + k) * a.width + first;
        double total = 0;
        for (int64_t c = 0; c < size; ++c) total += block[c];
        mean += total * static_cast<double>(positions_of(a, k));
      }
      mean /= count;
      for (int64_t k = 0; k < a.blocks; ++k) {
        const int64_t row = (region * a.blocks + k) * a.width + first;
        for (int64_t c = 0; c < size; ++c) {
          const double apart = a.block_mean[row + c] - mean;
          m2 += a.block_m2[row + c] + apart * apart * static_cast<double>(positions_of(a, k));
        }
      }
      a.mean[unit] = static_cast<float>(mean);
      a.rstd[unit] = static_cast<float>(1.0 / std::sqrt(m2 / count + a.eps));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias,
                                           int64_t groups, double eps, double floor, bool silu,
                                           bool channels_last) {
  NormSiluFwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, weight, bias, groups, floor, silu, channels_last, keep);
  a.eps = static_cast<float>(eps);
  Tensor y = allocate(x, channels_last, a.out);
  Tensor mean = empty(x, {groups ? a.regions * groups : 0}, ScalarType::Float);
  Tensor rstd = empty(x, {a.regions * (groups ? groups : a.length)}, ScalarType::Float);
  a.mean = data<float>(mean);
  a.rstd = data<float>(rstd);
  if (groups == 0) {
    for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL(norm_silu_rms_fwd, a, b, e); });
    return {y, mean, rstd};
  }
  Tensor partial = empty(x, {2, a.regions * a.blocks, a.width}, ScalarType::Float);
  a.block_mean = data<float>(partial);
  a.block_m2 = a.block_mean + a.regions * a.blocks * a.width;
  for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL(norm_silu_group_stats, a, b, e); });
  merge_stats(a);
  for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL(norm_silu_group_fwd, a, b, e); });
  return {y, mean, rstd};
}

// Column sums over the blocks of every region, and over all regions.
void sum_blocks(const NormSilu& a, const float* partial, std::vector<double>* per_region,
                float* total) {
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
            for (int64_t c = 0; c < n; ++c) {
              all[c] += sum[c];
              if (per_region) (*per_region)[region * a.width + first + c] = sum[c];
            }
          }
          for (int64_t c = 0; total && c < n; ++c) total[first + c] = static_cast<float>(all[c]);
        }
      });
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                            Optional weight, Optional bias, int64_t groups,
                                            double floor, bool silu, bool channels_last,
                                            int64_t needs) {
  NormSiluBwd a{};
  std::vector<std::vector<float>> keep;
  fill(a, x, weight, bias, groups, floor, silu, channels_last, keep);
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

  std::vector<double> region_du, region_duxhat;
  if (groups == 0) {
    for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL(norm_silu_rms_bwd, a, b, e); });
  } else {
    region_du.resize(a.regions * a.width);
    region_duxhat.resize(a.regions * a.width);
    for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL(norm_silu_group_sums, a, b, e); });
  }
  if (a.sum_du)
    sum_blocks(a, a.sum_du, groups ? &region_du : nullptr,
               needs & 4 ? data<float>(dbias) : nullptr);
  if (a.sum_duxhat)
    sum_blocks(a, a.sum_duxhat, groups ? &region_duxhat : nullptr,
               needs & 2 ? data<float>(dweight) : nullptr);
  if (groups == 0 || !(needs & 1)) return {dx, dweight, dbias};

  std::vector<float> c1(a.regions * groups), c2(a.regions * groups);
  const int64_t per_group = a.width / groups;
  const double count = static_cast<double>(a.length * per_group);
  for (int64_t unit = 0; unit < a.regions * groups; ++unit) {
    const int64_t first = unit / groups * a.width + unit % groups * per_group;
    double s1 = 0, s2 = 0;
    for (int64_t c = 0; c < per_group; ++c) {
      const double w = a.weight[unit % groups * per_group + c];
      s1 += w * region_du[first + c];
      s2 += w * region_duxhat[first + c];
    }
    c1[unit] = static_cast<float>(s1 / count);
    c2[unit] = static_cast<float>(s2 / count);
  }
  a.c1 = c1.data();
  a.c2 = c2.data();
  for_blocks(a, [&](int64_t b, int64_t e) { SORA_CALL_KERNEL(norm_silu_group_bwd, a, b, e); });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("norm_silu_fwd", TORCH_BOX(&forward));
  m.impl("norm_silu_bwd", TORCH_BOX(&backward));
}

}  // namespace sora
