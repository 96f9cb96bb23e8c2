// Whether a tensor holds neither NaN nor infinity.
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

// Numbers between two looks at what has been found.
constexpr int64_t kStretch = 4096;

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
  const auto* data = static_cast<const Bits*>(x.data_ptr());
  if (x.is_contiguous()) {
    return stretch_finite<Bits>(data, x.numel(), exponent);
  }
  const int64_t width = x.size(3);
  const bool dense = x.stride(2) == width;
  for (int64_t b = 0; b < x.size(0); ++b) {
    for (int64_t h = 0; h < x.size(1); ++h) {
      const Bits* head = data + b * x.stride(0) + h * x.stride(1);
      const int64_t step = dense ? x.size(2) : 1;
      for (int64_t i = 0; i < x.size(2); i += step) {
        if (!stretch_finite<Bits>(head + i * x.stride(2), step * width, exponent)) {
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace

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

}  // namespace longswift
