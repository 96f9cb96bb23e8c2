// Whether tensors hold neither NaN nor infinity.
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

// Numbers between two looks at what has been found, and those worth another thread.
constexpr int64_t kStretch = 4096;
constexpr int64_t kShare = 1 << 16;

// All bits of the exponent are set in NaN and infinity, and in nothing else.
template <typename Bits>
bool stretch_finite(const Bits* x, int64_t n, Bits exponent) {
  for (int64_t first = 0; first < n; first += kStretch) {
    const int64_t end = std::min(n, first + kStretch);
    Bits found = 0;
    for (int64_t i = first; i < end; ++i) {
      found |= (x[i] & exponent) == exponent;
    }
    if (found) {
      return false;
    }
  }
  return true;
}

template <typename Bits>
bool rows_finite(const at::Tensor& x, Bits exponent) {
  const auto* data = static_cast<const Bits*>(x.const_data_ptr());
  std::atomic<bool> finite{true};
  if (x.is_contiguous()) {
    at::parallel_for(0, x.numel(), kShare, [&](int64_t first, int64_t end) {
      if (!stretch_finite<Bits>(data + first, end - first, exponent)) {
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
      const Bits* row = data + head / heads * x.stride(0) + head % heads * x.stride(1) +
          i % rows * x.stride(2);
      if (!stretch_finite<Bits>(row, width, exponent)) {
        finite = false;
      }
    }
  });
  return finite;
}

bool all_finite(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return rows_finite<uint64_t>(x, 0x7ff0000000000000u);
    case at::kFloat:
      return rows_finite<uint32_t>(x, 0x7f800000u);
    case at::kBFloat16:
      return rows_finite<uint16_t>(x, 0x7f80u);
    default:
      TORCH_CHECK(x.scalar_type() == at::kHalf, "expected a floating dtype, got ", x.scalar_type());
      return rows_finite<uint16_t>(x, 0x7c00u);
  }
}

}  // namespace

int64_t first_not_finite(at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!all_finite(tensors[i])) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

}  // namespace longswift
