// Whether a tensor holds neither NaN nor infinity.
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

// All bits of the exponent are set in NaN and infinity, and in nothing else.
template <typename Bits>
bool rows_finite(const at::Tensor& x, Bits exponent) {
  const auto* data = static_cast<const Bits*>(x.data_ptr());
  const int64_t width = x.size(3);
  for (int64_t b = 0; b < x.size(0); ++b) {
    for (int64_t h = 0; h < x.size(1); ++h) {
      for (int64_t i = 0; i < x.size(2); ++i) {
        const Bits* row = data + b * x.stride(0) + h * x.stride(1) + i * x.stride(2);
        Bits worst = 0;
        for (int64_t d = 0; d < width; ++d) {
          worst = std::max<Bits>(worst, row[d] & exponent);
        }
        if (worst == exponent) {
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
