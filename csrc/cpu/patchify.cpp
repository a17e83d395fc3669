// CPU patchify: videos <-> packed tokens, one copy, any strides, raster or tile order. No arithmetic,
// hence no versions per instruction set. One loop serves both directions.
#include <algorithm>
#include <cstring>
#include <vector>

#include "bind.h"

namespace sora {
namespace {

struct Video {
  char* data;         // [C, T, H, W]
  int64_t stride[4];  // of c, t, h, w, in elements
  int64_t grid[3];    // tokens
  int64_t tile[3];    // tokens; the whole grid means raster order
  int64_t first;      // row of the token matrix
  int64_t first_row;  // number of (t, h) token rows before this video
};

struct Copy {
  std::vector<Video> videos;
  char* tokens;
  int64_t token_stride;  // elements
  int64_t channels, patch[3];
};

// Copies the (t, h) token rows [begin, end) of all videos. A Word is what is contiguous in both
// places: a whole patch row if the video's last stride is 1, else one element.
template <class Word, bool to_tokens>
void copy_rows(const Copy& a, int64_t element, int64_t begin, int64_t end) {
  const auto [pt, ph, pw] = a.patch;
  const int64_t words = pw * element / static_cast<int64_t>(sizeof(Word));
  size_t n = 0;
  for (int64_t row = begin; row < end; ++row) {
    while (n + 1 < a.videos.size() && row >= a.videos[n + 1].first_row) ++n;
    const Video& v = a.videos[n];
    const int64_t i = (row - v.first_row) / v.grid[1];
    const int64_t j = (row - v.first_row) % v.grid[1];
    // Place of token (i, j, k) in tile order: see sora_kernels/packing/tiles.py.
    const int64_t t0 = i / v.tile[0] * v.tile[0];
    const int64_t h0 = j / v.tile[1] * v.tile[1];
    const int64_t ta = std::min(v.tile[0], v.grid[0] - t0);
    const int64_t tb = std::min(v.tile[1], v.grid[1] - h0);
    const int64_t row_start = v.first + t0 * v.grid[1] * v.grid[2] + ta * h0 * v.grid[2];
    for (int64_t w0 = 0; w0 < v.grid[2]; w0 += v.tile[2]) {
      const int64_t tc = std::min(v.tile[2], v.grid[2] - w0);
      const int64_t place = row_start + ta * tb * w0 + ((i - t0) * tb + (j - h0)) * tc;
      int64_t feature = 0;
      for (int64_t c = 0; c < a.channels; ++c) {
        for (int64_t t = i * pt; t < (i + 1) * pt; ++t) {
          for (int64_t h = j * ph; h < (j + 1) * ph; ++h, feature += pw) {
            char* token = a.tokens + (place * a.token_stride + feature) * element;
            char* pixel = v.data + (c * v.stride[0] + t * v.stride[1] + h * v.stride[2] +
                                    w0 * pw * v.stride[3]) * element;
            const int64_t token_step = a.token_stride * element;
            const int64_t pixel_step = pw * v.stride[3] * element;
            const int64_t word_step =
                words == pw ? v.stride[3] * element : static_cast<int64_t>(sizeof(Word));
            for (int64_t k = 0; k < tc; ++k, token += token_step, pixel += pixel_step) {
              for (int64_t x = 0; x < words; ++x) {
                char* at = token + x * static_cast<int64_t>(sizeof(Word));
                if constexpr (to_tokens) {
                  std::memcpy(at, pixel + x * word_step, sizeof(Word));
                } else {
                  std::memcpy(pixel + x * word_step, at, sizeof(Word));
                }
              }
            }
          }
        }
      }
    }
  }
}

template <bool to_tokens>
void copy_all(const Copy& a, int64_t element) {
  if (a.videos.empty()) return;
  const Video& last = a.videos.back();
  const int64_t rows = last.first_row + last.grid[0] * last.grid[1];
  bool dense = true;
  int64_t widest = 1;
  for (const Video& v : a.videos) {
    dense &= v.stride[3] == 1;
    widest = std::max(widest, v.grid[2]);
  }
  const int64_t patch_bytes = a.patch[2] * element;
  const int64_t row_bytes =
      widest * a.channels * a.patch[0] * a.patch[1] * a.patch[2] * element;
  const int64_t word = dense && patch_bytes % 16 == 0  ? 16
                       : dense && patch_bytes % 8 == 0 ? 8
                       : dense && patch_bytes % 4 == 0 ? 4
                                                       : element;
  struct Word16 {
    uint64_t half[2];
  };
  torch::stable::parallel_for(0, rows, 1 + 65536 / row_bytes, [&](int64_t b, int64_t e) {
    switch (word) {
      case 16: copy_rows<Word16, to_tokens>(a, element, b, e); break;
      case 8: copy_rows<uint64_t, to_tokens>(a, element, b, e); break;
      case 4: copy_rows<uint32_t, to_tokens>(a, element, b, e); break;
      default: copy_rows<uint16_t, to_tokens>(a, element, b, e);
    }
  });
}

// Everything but the videos' memory. `grids` and `tiles` hold three numbers per video.
Copy describe(const std::vector<int64_t>& grids, const std::vector<int64_t>& tiles,
              const std::vector<int64_t>& patch, int64_t channels, int64_t& num_tokens) {
  STD_TORCH_CHECK(grids.size() % 3 == 0 && tiles.size() == grids.size() && patch.size() == 3,
                  "sora_kernels: patchify: expected three numbers per grid and tile");
  Copy a{};
  a.channels = channels;
  int64_t rows = 0;
  num_tokens = 0;
  for (int d = 0; d < 3; ++d) {
    a.patch[d] = patch[d];
    STD_TORCH_CHECK(patch[d] > 0, "sora_kernels: patch: expected positive sizes");
  }
  for (size_t n = 0; n < grids.size(); n += 3) {
    Video v{};
    for (int d = 0; d < 3; ++d) {
      v.grid[d] = grids[n + d];
      v.tile[d] = tiles[n + d];
      STD_TORCH_CHECK(v.grid[d] > 0 && v.tile[d] > 0,
                      "sora_kernels: grids, tiles: expected positive sizes");
    }
    v.first = num_tokens;
    v.first_row = rows;
    rows += v.grid[0] * v.grid[1];
    num_tokens += v.grid[0] * v.grid[1] * v.grid[2];
    a.videos.push_back(v);
  }
  return a;
}

void attach(Copy& a, size_t n, const Tensor& video, char* memory) {
  STD_TORCH_CHECK(video.dim() == 4 && video.size(0) == a.channels,
                  "sora_kernels: videos: expected [C, T, H, W]");
  for (int d = 0; d < 4; ++d) {
    a.videos[n].stride[d] = video.stride(d);
    STD_TORCH_CHECK(d == 0 || video.size(d) == a.videos[n].grid[d - 1] * a.patch[d - 1],
                    "sora_kernels: videos: expected sizes of grid times patch");
  }
  a.videos[n].data = memory;
}

Tensor forward(std::vector<Tensor> videos, std::vector<int64_t> grids, std::vector<int64_t> tiles,
               std::vector<int64_t> patch) {
  STD_TORCH_CHECK(!videos.empty() && 3 * videos.size() == grids.size(),
                  "sora_kernels: videos: expected one per grid, and at least one");
  int64_t num_tokens = 0;
  Copy a = describe(grids, tiles, patch, videos[0].size(0), num_tokens);
  for (size_t n = 0; n < videos.size(); ++n) {
    STD_TORCH_CHECK(dtype_of(videos[n]) == dtype_of(videos[0]),
                    "sora_kernels: videos: expected one dtype");
    attach(a, n, videos[n], static_cast<char*>(const_cast<void*>(videos[n].const_data_ptr())));
  }
  a.token_stride = a.channels * a.patch[0] * a.patch[1] * a.patch[2];
  Tensor tokens = empty(videos[0], {num_tokens, a.token_stride}, videos[0].scalar_type());
  a.tokens = data<char>(tokens);
  copy_all<true>(a, tokens.element_size());
  return tokens;
}

std::vector<Tensor> backward(Tensor tokens, std::vector<int64_t> grids, std::vector<int64_t> tiles,
                             std::vector<int64_t> patch, int64_t channels) {
  int64_t num_tokens = 0;
  Copy a = describe(grids, tiles, patch, channels, num_tokens);
  check_unit_stride(tokens, "tokens");
  dtype_of(tokens);
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == num_tokens &&
                      tokens.size(1) == channels * patch[0] * patch[1] * patch[2],
                  "sora_kernels: tokens: expected [grid tokens, C * pt * ph * pw]");
  std::vector<Tensor> videos;
  for (size_t n = 0; n < a.videos.size(); ++n) {
    const auto& grid = a.videos[n].grid;
    videos.push_back(empty(tokens, {channels, grid[0] * patch[0], grid[1] * patch[1],
                                    grid[2] * patch[2]}, tokens.scalar_type()));
    attach(a, n, videos[n], data<char>(videos[n]));
  }
  a.token_stride = tokens.stride(0);
  a.tokens = static_cast<char*>(const_cast<void*>(tokens.const_data_ptr()));
  copy_all<false>(a, tokens.element_size());
  return videos;
}

}  // namespace

SORA_CPU_OP(patchify, forward, backward)

}  // namespace sora
