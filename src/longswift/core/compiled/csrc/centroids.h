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
    const int64_t widest = std::max_element(spread, spread + dim_) - spread;
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
