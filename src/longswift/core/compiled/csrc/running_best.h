// The largest of many numbers that come a few at a time and are not kept.
#pragma once

#include "best.h"

namespace longswift {

class RunningBest {
 public:
  // Numbers that come at once.
  static constexpr int64_t kAtOnce = 16;

  // The `most` largest that exceed `limit` of places [first, end), of equal ones the first.
  void begin(int64_t most, int64_t first, int64_t end, float limit) {
    most_ = most;
    first_ = first;
    end_ = end;
    limit_ = limit;
    count_ = 0;
    room_ = 2 * most + kMore;
    values_.get(room_);
    places_.get(room_);
  }

  // The numbers of 16 places, all of them after those that were added before; aligned.
  void add(int64_t place, const float* numbers) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 values = _mm512_load_ps(numbers);
    __mmask16 taken = _mm512_cmp_ps_mask(values, _mm512_set1_ps(limit_), _CMP_GT_OQ);
    if (place < first_) {
      taken &= static_cast<__mmask16>(~0u << std::min(first_ - place, kAtOnce));
    }
    if (place + kAtOnce > end_) {
      taken &= static_cast<__mmask16>((1u << std::max<int64_t>(end_ - place, 0)) - 1);
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(place)), lanes);
    _mm512_storeu_ps(values_.get(0) + count_, _mm512_maskz_compress_ps(taken, values));
    _mm512_storeu_si512(places_.get(0) + count_, _mm512_maskz_compress_epi32(taken, places));
    count_ += __builtin_popcount(taken);
#else
    const int64_t last = std::min(end_ - place, kAtOnce);
    for (int64_t i = std::max<int64_t>(first_ - place, 0); i < last; ++i) {
      if (numbers[i] > limit_) {
        values_.get(0)[count_] = numbers[i];
        places_.get(0)[count_++] = static_cast<int32_t>(place + i);
      }
    }
#endif
    if (count_ + kAtOnce > room_) {
      keep_best();
    }
  }

  // What others must exceed.
  float limit() const { return limit_; }

  // Takes no more.
  void stop() { limit_ = -kHidden; }

  // Whether no lower limit would have found more.
  bool complete() const {
    return limit_ == kHidden || count_ >= std::min(most_, end_ - first_);
  }

  // How many are found, and their places, ascending.
  int64_t finish(int32_t* out) {
    if (count_ > most_) {
      keep_best();
    }
    std::copy(places_.data(), places_.data() + count_, out);
    return count_;
  }

 private:
  // Numbers beyond twice as many as are wanted.
  static constexpr int64_t kMore = 1024;

  void keep_best() {
    float* values = values_.get(0);
    int32_t *places = places_.get(0), *kept = kept_.get(most_);
    count_ = order_.find(values, count_, most_, kept);
    float least = -kHidden;
    for (int64_t i = 0; i < count_; ++i) {
      values[i] = values[kept[i]];
      places[i] = places[kept[i]];
      least = std::min(least, values[i]);
    }
    // Of equal ones the first are here.
    limit_ = least;
  }

  Best order_;
  Buffer<float> values_;
  Buffer<int32_t> places_, kept_;
  int64_t most_ = 0, first_ = 0, end_ = 0, count_ = 0, room_ = 0;
  float limit_ = kHidden;
};

}  // namespace longswift
