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

// A row as multiples of a step, whose inverse is given, each `offset`, 0 or 128, larger; zeros up to
// `padded`.
template <typename T>
void to_bytes(const T* row, int64_t dim, float inverse, int8_t* out, int64_t padded,
              int32_t offset = 0) {
  int64_t d = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (; d + kLanes <= dim; d += kLanes) {
    const __m512i whole = _mm512_cvtps_epi32(floats_at(row + d) * Vec(inverse));
    const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(whole),
                                        _mm_set1_epi8(static_cast<char>(offset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), bytes);
  }
#endif
  for (; d < dim; ++d) {
    const float whole = std::nearbyint(static_cast<float>(row[d]) * inverse);
    const auto byte = static_cast<int32_t>(std::clamp(whole, -kMostSteps, kMostSteps));
    out[d] = static_cast<int8_t>(byte + offset);
  }
  if (dim < padded) {
    std::memset(out + dim, 0, padded - dim);
  }
}

// The largest absolute number of rows.
template <typename T>
float peak_of(const T* rows, int64_t count) {
  Vec even(0.0f), odd(0.0f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    even = larger(even, floats_at(rows + i).abs());
    odd = larger(odd, floats_at(rows + i + kLanes).abs());
  }
  float peak = max_of(larger(even, odd));
  for (; i < count; ++i) {
    peak = std::max(peak, std::abs(static_cast<float>(rows[i])));
  }
  return peak;
}

}  // namespace longswift
