// CUDA binding of qk_norm_rope.
#include "qk_norm_rope.h"

#include "bind.h"
#include "qk_norm_rope_call.h"

namespace sora::cuda {
namespace {

class Device : public Cuda {
 public:
  using Pass = QkNormRope;
  using Cuda::Cuda;

  // Values on the GPU are trusted: to look at them would wait for it.
  const int64_t* index(const Tensor& t, int64_t rows) const {
    STD_TORCH_CHECK(rows <= INT_MAX, "sora_kernels: index: expected fewer than 2^31 tokens, got ", rows);
    return rows_of_index(t);
  }
  void check(const GridTable&, int64_t, int64_t, int64_t) const {}

  Matrix parameter(const Optional& t, int64_t heads, int64_t width, const char* name) const {
    Matrix m = vector(t, heads * width, name);
    if (heads > 1) m.stride = width;
    return m;
  }

  void forward(QkNormRope& a, int64_t) const {
    qk_plan(a, false);
    qk_norm_rope_fwd(a, stream());
  }

  void backward(QkNormRope& a, int64_t) const {
    qk_plan(a, true);
    std::vector<Tensor> partials;
    for (QkSide& s : a.side) {
      partials.push_back(empty({qk_partials(a, s)}, ScalarType::Float));
      s.partial = data<float>(partials.back());
    }
    qk_norm_rope_bwd(a, stream());
  }

  void copy_rows(const Tensor& from, Tensor& to, const int64_t* rows, int64_t count,
                 bool gather) const {
    QkNormRope a;
    a.width = width_of(from);
    a.type = dtype_of(from);
    a.index = rows;
    QkSide& s = a.side[0];
    s.tokens = count;
    s.heads = static_cast<int>(from.size(-2));
    a.side[1].wanted = false;
    (gather ? s.dy : s.x) = heads_of(from, "v");
    (gather ? s.dx : s.y) = data(to);
    qk_plan(a, gather);
    if (gather) qk_norm_rope_bwd(a, stream());  // the way back of the forward's
    else qk_norm_rope_fwd(a, stream());
  }
};

}  // namespace

SORA_CUDA_OP(qk_norm_rope, qk_forward<Device>, qk_backward<Device>)

}  // namespace sora::cuda
