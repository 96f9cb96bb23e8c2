// Whether tensors hold neither NaN nor infinity.
#include "finite.h"
#include "kernels.h"

namespace longswift {

namespace {

// Numbers worth another thread.
constexpr int64_t kShare = 1 << 16;

template <typename T>
bool all_finite(const at::Tensor& x) {
  std::atomic<bool> finite{true};
  if (x.is_contiguous()) {
    const T* data = x.const_data_ptr<T>();
    at::parallel_for(0, x.numel(), kShare, [&](int64_t first, int64_t end) {
      if (!stretch_finite(data + first, end - first)) {
        finite = false;
      }
    });
    return finite;
  }
  const int64_t heads = x.size(1), rows = x.size(2), width = x.size(3);
  const int64_t share = std::max<int64_t>(1, kShare / std::max<int64_t>(width, 1));
  at::parallel_for(0, x.size(0) * heads * rows, share, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end && finite; ++i) {
      const int64_t head = i / rows;
      if (!rows_finite(rows_of<const T>(x, head / heads, head % heads), i % rows, 1, width)) {
        finite = false;
      }
    }
  });
  return finite;
}

bool finite(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return all_finite<double>(x);
    case at::kFloat:
      return all_finite<float>(x);
    case at::kBFloat16:
      return all_finite<at::BFloat16>(x);
    default:
      TORCH_CHECK(x.scalar_type() == at::kHalf, "expected a floating dtype, got ", x.scalar_type());
      return all_finite<at::Half>(x);
  }
}

}  // namespace

int64_t first_not_finite(at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!finite(tensors[i])) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

}  // namespace longswift
