// Numbers as whole multiples of a step, at most 127 of them: factors of products that only rank.
#pragma once

#include <algorithm>
#include <cmath>

#include "common.h"

namespace longswift {

constexpr float kMostSteps = 127.0f;

// Steps of keys are powers of the fourth root of two, so that the largest key of a prefix changes them
// a few times only. The least that reaches `largest`.
inline int32_t step_level(float largest) {
  return static_cast<int32_t>(std::ceil(4.0f * std::log2(largest / kMostSteps)));
}

inline float step_at(int32_t level) {
  return std::exp2(static_cast<float>(level) / 4.0f);
}

// A row as multiples of a step, whose inverse is given; zeros up to `padded`.
template <typename T>
void to_bytes(const T* row, int64_t dim, float inverse, int8_t* out, int64_t padded) {
  int64_t d = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (; d + kLanes <= dim; d += kLanes) {
    const __m512i whole = _mm512_cvtps_epi32(floats_at(row + d) * Vec(inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), _mm512_cvtsepi32_epi8(whole));
  }
#endif
  for (; d < dim; ++d) {
    const float whole = std::nearbyint(static_cast<float>(row[d]) * inverse);
    out[d] = static_cast<int8_t>(std::clamp(whole, -kMostSteps, kMostSteps));
  }
  if (dim < padded) {
    std::memset(out + dim, 0, padded - dim);
  }
}

// The largest absolute number of some rows, and the sum of all squares.
struct Extent {
  float peak = 0.0f, squares = 0.0f;

  void join(const Extent& other) {
    peak = std::max(peak, other.peak);
    squares += other.squares;
  }
};

template <typename T>
Extent extent_of(const Rows<const T>& x, int64_t first, int64_t count, int64_t dim) {
  // Each of several waits for itself less often.
  constexpr int64_t ways = 4;
  Vec peak[ways], squares[ways];
  std::fill(peak, peak + ways, Vec(0.0f));
  std::fill(squares, squares + ways, Vec(0.0f));
  Extent rest;
  const auto add = [&](const T* x, int64_t way) __attribute__((always_inline)) {
    const Vec values = floats_at(x);
    peak[way] = larger(peak[way], values.abs());
    squares[way] = at::vec::fmadd(values, values, squares[way]);
  };
  for (int64_t i = first; i < first + count; ++i) {
    const T* row = x.row(i);
    int64_t d = 0;
    for (; d + ways * kLanes <= dim; d += ways * kLanes) {
      for (int64_t w = 0; w < ways; ++w) {
        add(row + d + w * kLanes, w);
      }
    }
    for (; d + kLanes <= dim; d += kLanes) {
      add(row + d, 0);
    }
    for (; d < dim; ++d) {
      const float value = row[d];
      rest.join({std::abs(value), value * value});
    }
  }
  for (int64_t w = 0; w < ways; ++w) {
    rest.join({max_of(peak[w]), sum_of(squares[w])});
  }
  return rest;
}

}  // namespace longswift
