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

  // Adds the scores of columns [first, first + count), in rows `step` apart, times `scale`
  // (positive), while they are in the nearest cache.
  template <bool coarse>
  void add(const float* scores, int64_t step, int64_t keys, float scale, int64_t first,
           int64_t count) {
    add_scaled<coarse>(scores, step, keys, [&](int64_t) { return Vec(scale); }, first, count);
  }

  // Columns that have a scale each.
  template <bool coarse>
  void add(const float* scores, int64_t step, int64_t keys, const float* scales, int64_t first,
           int64_t count) {
    const auto scale_at = [&](int64_t c) { return Vec::loadu(scales + c); };
    add_scaled<coarse>(scores, step, keys, scale_at, first, count);
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

  // What products of columns [first, first + count), scores when multiplied by `scale`, are larger by
  // when they are log-probabilities: minus the logarithms of the sums.
  template <typename Sum>
  void starts(float scale, int64_t first, int64_t count, Sum* out) const {
    const float unit = 1.0f / (scale * kLog2e);
    for (int64_t c = first; c < first + count; ++c) {
      const float start = -total_.data()[c] * unit;
      if constexpr (std::is_same_v<Sum, float>) {
        out[c] = start;
      } else {
        // Farther than products reach, and not so far that a sum overflows.
        constexpr float far = 1 << 30;
        out[c] = static_cast<Sum>(std::nearbyint(std::clamp(start, -far, far)));
      }
    }
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
  template <bool coarse, typename Scale>
  void add_scaled(const float* scores, int64_t step, int64_t keys, const Scale& scale_at,
                  int64_t first, int64_t count) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= count; c += 4 * kLanes) {
      add_to<coarse, 4>(scores + c, step, keys, scale_at, first + c);
    }
    if (c + 2 * kLanes <= count) {
      add_to<coarse, 2>(scores + c, step, keys, scale_at, first + c);
      c += 2 * kLanes;
    }
    if (c < count) {
      add_to<coarse, 1>(scores + c, step, keys, scale_at, first + c);
    }
  }

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
        best = larger(best, x);
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
      larger(Vec::loadu(rank + k), max_of_each(best)).store(rank + k);
    }
    for (; k < keys; ++k) {
      rank[k] = std::max(rank[k], max_of(best_of(k)));
    }
  }

  // `parts` vectors of columns from `column` on; several keys at once, as one waits for its maximum
  // and its sum.
  template <bool coarse, int parts, typename Scale>
  void add_to(const float* scores, int64_t step, int64_t keys, const Scale& scale_at,
              int64_t column) {
    constexpr int ways = 4 / parts;
    float *top = top_.get(0) + column, *total = total_.get(0) + column;
    Vec by[parts];
    for (int p = 0; p < parts; ++p) {
      by[p] = scale_at(column + p * kLanes) * Vec(kLog2e);
    }
    Vec high[ways][parts], sum[ways][parts];
    for (int w = 0; w < ways; ++w) {
      for (int p = 0; p < parts; ++p) {
        high[w][p] = Vec(kHidden);
        sum[w][p] = Vec(0.0f);
      }
    }
    const int64_t even = keys / ways * ways;
    const auto value = [&](int64_t k, int p) __attribute__((always_inline)) {
      return Vec::loadu(scores + k * step + p * kLanes);
    };
    for (int64_t k = 0; k < even; k += ways) {
      for (int w = 0; w < ways; ++w) {
        for (int p = 0; p < parts; ++p) {
          high[w][p] = larger(high[w][p], value(k + w, p));
        }
      }
    }
    for (int64_t k = even; k < keys; ++k) {
      for (int p = 0; p < parts; ++p) {
        high[0][p] = larger(high[0][p], value(k, p));
      }
    }
    Vec limit[parts];
    for (int p = 0; p < parts; ++p) {
      for (int w = 1; w < ways; ++w) {
        high[0][p] = larger(high[0][p], high[w][p]);
      }
      const Vec before = Vec::loadu(top + p * kLanes);
      // A column that has seen nothing is below everything.
      limit[p] = larger(larger(before, high[0][p] * by[p]), Vec(kLowest));
      sum[0][p] = Vec::loadu(total + p * kLanes) * quick_exp2(before - limit[p]);
    }
    for (int64_t k = 0; k < even; k += ways) {
      for (int w = 0; w < ways; ++w) {
        for (int p = 0; p < parts; ++p) {
          sum[w][p] += power<coarse>(at::vec::fmsub(value(k + w, p), by[p], limit[p]));
        }
      }
    }
    for (int64_t k = even; k < keys; ++k) {
      for (int p = 0; p < parts; ++p) {
        sum[0][p] += power<coarse>(at::vec::fmsub(value(k, p), by[p], limit[p]));
      }
    }
    for (int p = 0; p < parts; ++p) {
      for (int w = 1; w < ways; ++w) {
        sum[0][p] += sum[w][p];
      }
      limit[p].store(top + p * kLanes);
      sum[0][p].store(total + p * kLanes);
    }
  }

  Buffer<float> top_, total_;
  int64_t count_ = 0, padded_ = 0;
};

}  // namespace longswift
