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

  // Scales the scores `[keys, padded]` and adds them, while they are in the nearest cache.
  void add(float* scores, int64_t keys, float scale) {
    float *top = top_.get(0), *total = total_.get(0);
    int64_t c = 0;
    for (; c + 4 * kLanes <= padded_; c += 4 * kLanes) {
      add_to<4>(scores + c, keys, scale, top + c, total + c);
    }
    for (; c < padded_; c += kLanes) {
      add_to<1>(scores + c, keys, scale, top + c, total + c);
    }
  }

  // Ends the sums.
  void finish() {
    float *top = top_.get(0), *total = total_.get(0);
    for (int64_t c = 0; c < count_; ++c) {
      total[c] = top[c] + std::log2(total[c]);
    }
    // Columns that are no rows rank nothing.
    std::fill(total + count_, total + padded_, -kHidden);
  }

  // Raises the rank of every key to its largest log-probability.
  void raise(const float* scores, int64_t keys, float* rank) {
    const float* lse = total_.get(0);
    for (int64_t k = 0; k < keys; ++k) {
      Vec best(kHidden);
      const float* of_key = scores + k * padded_;
      for (int64_t c = 0; c < padded_; c += kLanes) {
        best = at::vec::maximum(best, Vec::loadu(of_key + c) - Vec::loadu(lse + c));
      }
      rank[k] = std::max(rank[k], max_of(best));
    }
  }

 private:
  template <int parts>
  void add_to(float* scores, int64_t keys, float scale, float* top, float* total) const {
    const Vec by(scale * kLog2e);
    Vec before[parts], high[parts], sum[parts];
    for (int p = 0; p < parts; ++p) {
      high[p] = before[p] = Vec::loadu(top + p * kLanes);
    }
    for (int64_t k = 0; k < keys; ++k) {
      for (int p = 0; p < parts; ++p) {
        float* place = scores + k * padded_ + p * kLanes;
        const Vec x = Vec::loadu(place) * by;
        x.store(place);
        high[p] = at::vec::maximum(high[p], x);
      }
    }
    for (int p = 0; p < parts; ++p) {
      sum[p] = Vec::loadu(total + p * kLanes) * quick_exp2(before[p] - high[p]);
    }
    for (int64_t k = 0; k < keys; ++k) {
      for (int p = 0; p < parts; ++p) {
        sum[p] += quick_exp2(Vec::loadu(scores + k * padded_ + p * kLanes) - high[p]);
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
