// Whether numbers are neither NaN nor infinite.
#pragma once

#include "common.h"

namespace longswift {

// Numbers between two looks at what has been found.
constexpr int64_t kStretch = 4096;

// The type as wide as a number, and the bits of its exponent: all set in NaN and infinity, and in
// nothing else.
template <typename T>
struct Exponent;
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr Bits kSet = 0x7ff0000000000000u;
};
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  static constexpr Bits kSet = 0x7f800000u;
};
template <>
struct Exponent<at::BFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kSet = 0x7f80u;
};
template <>
struct Exponent<at::Half> {
  using Bits = uint16_t;
  static constexpr Bits kSet = 0x7c00u;
};

template <typename T>
bool stretch_finite(const T* numbers, int64_t n) {
  using Bits = typename Exponent<T>::Bits;
  constexpr Bits set = Exponent<T>::kSet;
  const auto* x = reinterpret_cast<const Bits*>(numbers);
  for (int64_t first = 0; first < n; first += kStretch) {
    const int64_t end = std::min(n, first + kStretch);
    Bits found = 0;
    for (int64_t i = first; i < end; ++i) {
      found |= (x[i] & set) == set;
    }
    if (found) {
      return false;
    }
  }
  return true;
}

// Rows [first, +count).
template <typename T>
bool rows_finite(const Rows<const T>& x, int64_t first, int64_t count, int64_t width) {
  if (x.step == width) {
    return stretch_finite(x.row(first), count * width);
  }
  for (int64_t i = first; i < first + count; ++i) {
    if (!stretch_finite(x.row(i), width)) {
      return false;
    }
  }
  return true;
}

}  // namespace longswift
