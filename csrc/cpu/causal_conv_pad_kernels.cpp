// Copies of causal_conv_pad. Compiled once per instruction set; no torch headers.
#include "causal_conv_pad.h"

#include <vector>

#include "vec.h"

namespace sora::SORA_ISA {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kChunk = 64 << 10;  // source bytes that are still in cache for their second use

// n bytes; past the cache, whole lines are streamed wherever `to` begins.
void copy_bytes(char* to, const char* from, int64_t n, bool past_cache) {
  if (!past_cache || n < 4 * kLine) {
    std::memcpy(to, from, n);
    return;
  }
  const int64_t head = -reinterpret_cast<uintptr_t>(to) % kLine;
  std::memcpy(to, from, head);
  copy_past_cache(to + head, from + head, n - head);
}

const char* at(const Frames& x, int64_t outer, int64_t plane, int64_t frame, int64_t h) {
  return x.data + plane / outer * x.stride[0] + plane % outer * x.stride[1] + frame * x.stride[2] +
         h * x.stride[3];
}

// One row of W x I elements of any strides, made contiguous. A line of elements along w at a time:
// where the source has its channels first, they are one line there.
template <class Word>
void gather_row(char* to, const char* from, const Frames& x, int64_t width, int64_t inner) {
  constexpr int64_t size = sizeof(Word), line = kLine / size;
  for (int64_t w0 = 0; w0 < width; w0 += line) {
    const int64_t w1 = w0 + line < width ? w0 + line : width;
    for (int64_t i = 0; i < inner; ++i)
      for (int64_t w = w0; w < w1; ++w)
        std::memcpy(to + (w * inner + i) * size, from + w * x.stride[4] + i * x.stride[5], size);
  }
}

void copy_row(const CausalConvPad& a, char* to, const Frames& x, const char* from) {
  if (x.dense_row) copy_bytes(to, from, a.row_bytes(), a.stream);
  else if (a.element == 2) gather_row<uint16_t>(to, from, x, a.width, a.inner);
  else gather_row<uint32_t>(to, from, x, a.width, a.inner);
}

// out[d] = sum of terms[d] in fp32, in their order; a term that is not dense is read by element.
template <class T>
struct Term {
  const char* data;
  const Frames* of;
};

template <class T>
void sum_terms(const CausalConvPad& a, T* out, const std::vector<Term<T>>& terms) {
  bool dense = true;
  for (const Term<T>& t : terms) dense &= t.of->dense_row;
  if (dense) {
    for_row(a.width * a.inner, [&](int64_t d, auto io) {
      Vec v = io.get(reinterpret_cast<const T*>(terms[0].data) + d);
      for (size_t n = 1; n < terms.size(); ++n)
        v = v + io.get(reinterpret_cast<const T*>(terms[n].data) + d);
      io.put(out + d, v);
    });
    return;
  }
  const Tail one{1};
  for (int64_t w = 0; w < a.width; ++w) {
    for (int64_t i = 0; i < a.inner; ++i, ++out) {
      Vec v = Vec{};
      for (const Term<T>& t : terms)
        v = v + one.get(reinterpret_cast<const T*>(t.data + w * t.of->stride[4] +
                                                   i * t.of->stride[5]));
      one.put(out, v);
    }
  }
}

template <class T>
void backward(const CausalConvPadBwd& a, int64_t begin, int64_t end) {
  const int64_t bytes = a.row_bytes();
  const int64_t first_kept = a.padded_frames() - a.keep;
  std::vector<Term<T>> terms;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row % a.height;
    const int64_t source = a.first + row / a.height % a.count;
    const int64_t plane = row / a.height / a.count;
    char* out = a.grad + row * bytes;
    // Padded frames that are copies of this one: the fill, if it is the first, and itself.
    const int64_t last = a.fill + source;
    const int64_t from = a.replicate && source == 0 ? 0 : last;
    terms.clear();
    for (int64_t j = from; j <= last; ++j)
      terms.push_back({at(a.dpadded, a.outer, plane, j, a.top + h) + a.left * a.dpadded.stride[4],
                       &a.dpadded});
    for (int64_t j = from > first_kept ? from : first_kept; j <= last; ++j)
      terms.push_back({at(a.dkept, a.outer, plane, j - first_kept, h), &a.dkept});
    if (terms.size() == 1) copy_row(a, out, *terms[0].of, terms[0].data);
    else sum_terms(a, reinterpret_cast<T*>(out), terms);
  }
  if (a.stream) stream_fence();
}

}  // namespace

void causal_conv_pad_fwd(const CausalConvPadFwd& a, int64_t begin, int64_t end) {
  const int64_t in = a.row_bytes(), left = a.left * a.inner * a.element,
                right = a.right * a.inner * a.element, out_bytes = left + in + right;
  const int64_t height = a.padded_height(), frames = a.padded_frames();
  const bool around = a.top || a.bottom || a.left || a.right;
  for (int64_t row = begin; row < end;) {
    const int64_t h = row % height, j = row / height % frames, plane = row / height / frames;
    const int64_t y = h - a.top;
    char* out = a.padded + row * out_bytes;
    int64_t source = j - a.fill;
    if (source < 0 && a.replicate) source = 0;
    const bool cached = source < a.cache_frames;
    const Frames& x = cached ? a.cache : a.x;
    const char* from = nullptr;
    if (source >= 0 && y >= 0 && y < a.height)
      from = at(x, a.outer, plane, cached ? source : source - a.cache_frames, y);
    char* kept = nullptr;
    if (const int64_t k = j - (frames - a.keep); k >= 0 && y >= 0 && y < a.height)
      kept = a.kept + ((plane * a.keep + k) * a.height + y) * in;

    if (from && !around && x.dense_frame) {  // as many rows of the frame as still fit in cache
      int64_t rows = 1 + kChunk / (in + 1);
      if (rows > height - h) rows = height - h;
      if (rows > end - row) rows = end - row;
      copy_bytes(out, from, rows * in, a.stream);
      if (kept) copy_bytes(kept, from, rows * in, false);
      row += rows;
      continue;
    }
    if (from) {
      std::memset(out, 0, left);
      copy_row(a, out + left, x, from);
      std::memset(out + left + in, 0, right);
      if (kept) copy_row(a, kept, x, from);
    } else {
      std::memset(out, 0, out_bytes);
      if (kept) std::memset(kept, 0, in);
    }
    ++row;
  }
  if (a.stream) stream_fence();
}

void causal_conv_pad_bwd(const CausalConvPadBwd& a, int64_t begin, int64_t end) {
  if (a.type == DType::bf16) backward<bf16>(a, begin, end);
  else if (a.type == DType::f16) backward<f16>(a, begin, end);
  else backward<float>(a, begin, end);
}

}  // namespace sora::SORA_ISA
