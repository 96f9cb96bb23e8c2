// Softmax along the rows of a matrix that comes some columns at a time.
#pragma once

#include "common.h"

namespace longswift {

// Sums of exponentials of several rows of scores; every lane keeps its own, as adding lanes up for
// each piece would cost more than the sums. Logarithms are those of base two.
class Lines {
 public:
  void begin(int64_t rows) {
    float* top = top_.get(rows * kLanes);
    std::fill(top, top + rows * kLanes, kHidden);
    std::fill(total_.get(rows * kLanes), total_.get(rows * kLanes) + rows * kLanes, 0.0f);
  }

  // Adds `n` scores of a row, natural logarithms.
  template <bool coarse>
  void add(int64_t row, const float* scores, int64_t n) {
    if (n <= 0) {
      return;
    }
    const Vec by(kLog2e);
    Vec high = Vec::loadu(top_.get(0) + row * kLanes);
    const Vec before = high;
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      high = larger(high, Vec::loadu(scores + i) * by);
    }
    const Vec last = Vec::blendv(Vec(kHidden), Vec::loadu(scores + whole, n - whole) * by,
                                 Vec::arange(0.0f, 1.0f) < Vec(static_cast<float>(n - whole)));
    high = larger(high, last);
    // A lane that has seen nothing is below everything.
    high = larger(high, Vec(kLowest));
    Vec sum = Vec::loadu(total_.get(0) + row * kLanes) * quick_exp2(before - high);
    for (int64_t i = 0; i < whole; i += kLanes) {
      sum += power<coarse>(at::vec::fmsub(Vec::loadu(scores + i), by, high));
    }
    sum += quick_exp2(last - high);
    high.store(top_.get(0) + row * kLanes);
    sum.store(total_.get(0) + row * kLanes);
  }

  // Logarithm of a row's sum, natural.
  float lse(int64_t row) {
    const Vec high = Vec::loadu(top_.get(0) + row * kLanes);
    const float top = max_of(high);
    const float sum = sum_of(Vec::loadu(total_.get(0) + row * kLanes) * quick_exp2(high - Vec(top)));
    return (top + std::log2(sum)) / kLog2e;
  }

 private:
  Buffer<float> top_, total_;
};

}  // namespace longswift
