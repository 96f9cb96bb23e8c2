// Groups of similar query rows, and their means.
#pragma once

#include <numeric>
#include <vector>

#include "common.h"

namespace longswift {

// Rows are halved at the median of the channel in which they differ most, until halves have at most
// `most` rows. The last row of an odd number counts twice. Deterministic: of equal rows the earlier
// belong to the first half.
class Centroids {
 public:
  // Rows [first, first + rows) of every head; returns how many groups there are.
  template <typename T>
  int64_t find(const std::vector<Rows<const T>>& heads, int64_t first, int64_t rows, int64_t dim,
               int64_t most) {
    const int64_t count = rows * static_cast<int64_t>(heads.size());
    dim_ = dim;
    float* x = rows_.get(count * dim);
    for (size_t h = 0; h < heads.size(); ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        convert(x + (h * rows + i) * dim, heads[h].row(first + i), dim);
      }
    }
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0);
    int64_t groups = 1;
    for (size_ = count; size_ > most; size_ /= 2, groups *= 2) {
      if (size_ % 2 != 0) {
        make_even(groups);
      }
      for (int64_t g = 0; g < groups; ++g) {
        halve(x, order_.data() + g * size_);
      }
    }
    return groups;
  }

  // The mean of a group.
  void mean(int64_t group, float* out) const {
    const int32_t* rows = order_.data() + group * size_;
    std::fill(out, out + dim_, 0.0f);
    for (int64_t i = 0; i < size_; ++i) {
      add(out, rows_.data() + rows[i] * dim_);
    }
    for (int64_t d = 0; d < dim_; ++d) {
      out[d] /= static_cast<float>(size_);
    }
  }

 private:
  void make_even(int64_t groups) {
    const std::vector<int32_t> odd = order_;
    order_.resize(groups * (size_ + 1));
    for (int64_t g = 0; g < groups; ++g) {
      const auto first = odd.begin() + g * size_, end = first + size_;
      const auto out = std::copy(first, end, order_.begin() + g * (size_ + 1));
      *out = *std::max_element(first, end);
    }
    ++size_;
  }

  void add(float* out, const float* row) const {
    for (int64_t d = 0; d < dim_; ++d) {
      out[d] += row[d];
    }
  }

  void halve(const float* x, int32_t* rows) {
    float spread[dim_];
    for (int64_t d = 0; d < dim_; d += kAtOnce * kLanes) {
      spreads(x + d, rows, std::min(kAtOnce, (dim_ - d) / kLanes), spread + d);
    }
    const int64_t widest = first_largest(spread, dim_);
#if defined(CPU_CAPABILITY_AVX512)
    if (size_ <= kCounted) {
      alignas(64) float values[kCounted];
      for (int64_t i = 0; i < size_; ++i) {
        values[i] = x[rows[i] * dim_ + widest];
      }
      halve_by_counts(values, rows);
      return;
    }
#endif
    // Values and, where they are equal, rows in the order of integers.
    int64_t* ranked = ranked_.get(size_);
    for (int64_t i = 0; i < size_; ++i) {
      ranked[i] = static_cast<int64_t>(ordered(x[rows[i] * dim_ + widest])) << 32 | rows[i];
    }
    std::nth_element(ranked, ranked + size_ / 2, ranked + size_);
    for (int64_t i = 0; i < size_; ++i) {
      rows[i] = static_cast<int32_t>(ranked[i]);
    }
  }

  static int64_t first_largest(const float* x, int64_t n) {
    const float largest = max_over(x, n);
    int64_t i = 0;
    while (x[i] < largest) {
      ++i;
    }
    return i;
  }

#if defined(CPU_CAPABILITY_AVX512)
  // Rows whose values are counted rather than sorted.
  static constexpr int64_t kCounted = 256;

  // Of few values each is told how many are below it: no branch depends on them.
  void halve_by_counts(float* values, int32_t* rows) const {
    std::fill(values + size_, values + round_up(size_, 16), -kHidden);
    alignas(64) int32_t upper[kCounted];
    int64_t low = 0, high = 0;
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(static_cast<int>(size_ / 2));
    for (int64_t i = 0; i < size_; i += 16) {
      const __m512 mine = _mm512_load_ps(values + i);
      __m512i below = _mm512_setzero_si512();
      const auto count = [&](__mmask16 less) __attribute__((always_inline)) {
        below = _mm512_mask_add_epi32(below, less, below, one);
      };
      // Of equal values the earlier is below.
      int64_t j = 0;
      for (; j < i; ++j) {
        count(_mm512_cmp_ps_mask(_mm512_set1_ps(values[j]), mine, _CMP_LE_OQ));
      }
      for (; j < std::min(i + 16, size_); ++j) {
        const __m512 other = _mm512_set1_ps(values[j]);
        const __mmask16 later = static_cast<__mmask16>(0xfffe << (j - i));
        count(_mm512_cmp_ps_mask(other, mine, _CMP_LT_OQ) |
              _mm512_mask_cmp_ps_mask(later, other, mine, _CMP_EQ_OQ));
      }
      for (; j < size_; ++j) {
        count(_mm512_cmp_ps_mask(_mm512_set1_ps(values[j]), mine, _CMP_LT_OQ));
      }
      const int64_t here = std::min<int64_t>(16, size_ - i);
      const __mmask16 there = static_cast<__mmask16>((1 << here) - 1);
      const __mmask16 lower = _mm512_mask_cmplt_epi32_mask(there, below, half);
      const __m512i index = _mm512_maskz_loadu_epi32(there, rows + i);
      _mm512_mask_compressstoreu_epi32(rows + low, lower, index);
      _mm512_mask_compressstoreu_epi32(upper + high, there & ~lower, index);
      low += __builtin_popcount(lower);
      high += here - __builtin_popcount(lower);
    }
    std::copy(upper, upper + high, rows + low);
  }
#endif

  // Vectors of channels that are kept in registers.
  static constexpr int64_t kAtOnce = 4;

  // Sums of squared distances to the mean, of `vectors` vectors of channels.
  void spreads(const float* x, const int32_t* rows, int64_t vectors, float* out) const {
    if (vectors == kAtOnce) {
      spreads_of<kAtOnce>(x, rows, out);
      return;
    }
    for (int64_t v = 0; v < vectors; ++v) {
      spreads_of<1>(x + v * kLanes, rows, out + v * kLanes);
    }
  }

  template <int64_t vectors>
  void spreads_of(const float* x, const int32_t* rows, float* out) const {
    Vec mean[vectors], spread[vectors];
    for (int64_t v = 0; v < vectors; ++v) {
      mean[v] = spread[v] = Vec(0.0f);
    }
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        mean[v] += Vec::loadu(x + rows[i] * dim_ + v * kLanes);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      mean[v] = mean[v] / Vec(static_cast<float>(size_));
    }
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec apart = Vec::loadu(x + rows[i] * dim_ + v * kLanes) - mean[v];
        spread[v] = at::vec::fmadd(apart, apart, spread[v]);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      spread[v].store(out + v * kLanes);
    }
  }

  Buffer<float> rows_;
  std::vector<int32_t> order_;
  Buffer<int64_t> ranked_;
  int64_t dim_ = 0, size_ = 0;
};

}  // namespace longswift
