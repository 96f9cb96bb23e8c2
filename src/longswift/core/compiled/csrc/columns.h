// Softmax along the columns of a matrix that comes piece by piece.
#pragma once

#include "common.h"

namespace longswift {

// The softmax of several query rows, each a column of scores, over keys that come piece by piece.
// Logarithms are those of base two.
class Columns {
 public:
  // `count` columns in `padded`, a multiple of the lanes.
  void begin(int64_t count, int64_t padded) {
    count_ = count;
    padded_ = padded;
    std::fill(total_.get(padded), total_.get(padded) + padded, 1.0f);
    std::fill(top_.get(padded), top_.get(padded) + padded, kHidden);
  }

  // What columns [first, first + count) have seen already, as natural logarithms.
  void start_with(const float* lse, int64_t first, int64_t count) {
    float* top = top_.get(0) + first;
    for (int64_t c = 0; c < count; ++c) {
      top[c] = lse[c] * kLog2e;
    }
  }

  // Adds the scores `[keys, padded]`, times `scale` (positive), while they are in the nearest cache.
  template <bool coarse>
  void add(const float* scores, int64_t keys, float scale) {
    float *top = top_.get(0), *total = total_.get(0);
    int64_t c = 0;
    for (; c + 4 * kLanes <= padded_; c += 4 * kLanes) {
      add_to<coarse, 4>(scores + c, keys, scale, top + c, total + c, padded_);
    }
    for (; c < padded_; c += kLanes) {
      add_to<coarse, 1>(scores + c, keys, scale, top + c, total + c, padded_);
    }
  }

  // Ends the sums.
  void finish() {
    float *top = top_.get(0), *total = total_.get(0);
    for (int64_t c = 0; c < count_; ++c) {
      total[c] = top[c] + std::log2(total[c]);
    }
    drop(count_, padded_);
  }

  // Columns [first, end) are no rows.
  void drop(int64_t first, int64_t end) {
    std::fill(total_.get(0) + first, total_.get(0) + end, -kHidden);
  }

  // Raises the rank of every key to its largest log-probability in columns [first, first + count).
  void raise(const float* scores, int64_t keys, float scale, float* rank, int64_t first,
             int64_t count) const {
    const int64_t end = first + count;
    int64_t c = first;
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
      raise_by<4>(scores + c, keys, scale, rank, total_.data() + c);
    }
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      raise_by<2>(scores + c, keys, scale, rank, total_.data() + c);
    }
    for (; c < end; c += kLanes) {
      raise_by<1>(scores + c, keys, scale, rank, total_.data() + c);
    }
  }

 private:
  template <int parts>
  void raise_by(const float* scores, int64_t keys, float scale, float* rank,
                const float* total) const {
    const Vec by(scale * kLog2e);
    Vec lse[parts];
    for (int p = 0; p < parts; ++p) {
      lse[p] = Vec::loadu(total + p * kLanes);
    }
    const auto best_of = [&](int64_t k) __attribute__((always_inline)) {
      const float* of_key = scores + k * padded_;
      Vec best = at::vec::fmsub(Vec::loadu(of_key), by, lse[0]);
      for (int p = 1; p < parts; ++p) {
        const Vec x = at::vec::fmsub(Vec::loadu(of_key + p * kLanes), by, lse[p]);
        best = at::vec::maximum(best, x);
      }
      return best;
    };
    int64_t k = 0;
    for (; k + kLanes <= keys; k += kLanes) {
      Vec best[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        best[i] = best_of(k + i);
      }
      at::vec::maximum(Vec::loadu(rank + k), max_of_each(best)).store(rank + k);
    }
    for (; k < keys; ++k) {
      rank[k] = std::max(rank[k], max_of(best_of(k)));
    }
  }

  template <bool coarse, int parts>
  static void add_to(const float* scores, int64_t keys, float scale, float* top, float* total,
                     int64_t step) {
    const Vec by(scale * kLog2e);
    Vec before[parts], high[parts], sum[parts];
    for (int p = 0; p < parts; ++p) {
      before[p] = Vec::loadu(top + p * kLanes);
      high[p] = Vec(kHidden);
    }
    for (int64_t k = 0; k < keys; ++k) {
      for (int p = 0; p < parts; ++p) {
        high[p] = at::vec::maximum(high[p], Vec::loadu(scores + k * step + p * kLanes));
      }
    }
    for (int p = 0; p < parts; ++p) {
      // A column that has seen nothing is below everything.
      high[p] = at::vec::maximum(at::vec::maximum(before[p], high[p] * by), Vec(kLowest));
    }
    for (int p = 0; p < parts; ++p) {
      sum[p] = Vec::loadu(total + p * kLanes) * quick_exp2(before[p] - high[p]);
    }
    for (int64_t k = 0; k < keys; ++k) {
      for (int p = 0; p < parts; ++p) {
        const Vec x = Vec::loadu(scores + k * step + p * kLanes);
        sum[p] += power<coarse>(at::vec::fmsub(x, by, high[p]));
      }
    }
    for (int p = 0; p < parts; ++p) {
      high[p].store(top + p * kLanes);
      sum[p].store(total + p * kLanes);
    }
  }

  Buffer<float> top_, total_;
  int64_t count_ = 0, padded_ = 0;
};

}  // namespace longswift
