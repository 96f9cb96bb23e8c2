// The largest of many numbers.
#pragma once

#include "common.h"

namespace longswift {

class Best {
 public:
  // Writes the indices of the `most` largest numbers above minus infinity, ascending; of equal ones
  // the first are taken. Returns how many there are.
  int64_t find(const float* x, int64_t n, int64_t most, int32_t* index) {
    if (most <= 0 || n <= 0) {
      return 0;
    }
    float limit = kHidden;
    const float least = n > kFew ? guess(x, n, most) : kHidden;
    const int64_t kept = above(x, n, least);
    int64_t ties = 0;
    if (kept >= most) {
      // Never below what was kept: there may be more of the others than are wanted.
      limit = std::max(least, largest(keys_.get(0), kept, most, &ties));
    } else if (n > kFew) {
      // The guess was too high, or there are fewer numbers than wanted.
      const int64_t all = above(x, n, kHidden);
      if (all > most) {
        limit = largest(keys_.get(0), all, most, &ties);
      }
    }
    return indices(x, n, limit, ties, most, index);
  }

 private:
  static constexpr int64_t kFew = 4096, kSample = 512, kFewer = 64;
  // What a vector may be written beyond its end.
  static constexpr int64_t kSlack = 16;

  static float number_of(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // A little less than the `most`-th largest, judged by a sample: leaves few numbers to rank.
  float guess(const float* x, int64_t n, int64_t most) {
    int32_t* sample = keys_.get(kSample + kSlack);
    const int64_t step = n / kSample;
    for (int64_t i = 0; i < kSample; ++i) {
      sample[i] = ordered(x[i * step] + 0.0f);
    }
    // What the sample says is off by the root of it.
    const float expected = static_cast<float>(most) * kSample / n;
    const auto place = std::min<int64_t>(kSample, expected + 3.0f * std::sqrt(expected) + 5.0f);
    int64_t ties;
    return largest(sample, kSample, place, &ties);
  }

  // What the `k` largest exceed, and how many numbers equal to it belong to them, too. Where numbers
  // lie evenly between two limits, another follows from how many are above each; every other limit
  // halves the bits between them, so that the search ends wherever they lie.
  static float largest(const int32_t* keys, int64_t n, int64_t k, int64_t* ties) {
    // The invariant: at least `k` keys are >= low, fewer are > high.
    int64_t low = ordered(kHidden), high = ordered(-kHidden), more = 0, all = n;
    if (n > kFewer) {
      low = *std::min_element(keys, keys + n);
      high = *std::max_element(keys, keys + n);
    }
    for (bool even = n > kFewer; low < high; even = !even) {
      int64_t middle = low + (high - low) / 2;
      if (even) {
        const float least = number_of(static_cast<int32_t>(low));
        const float most = number_of(static_cast<int32_t>(high));
        const float share = (all - k + 0.5f) / std::max<float>(all - more, 1.0f);
        const float between = least + (most - least) * share;
        middle = between > kHidden && between < -kHidden
                     ? std::clamp<int64_t>(ordered(between), low, high - 1)
                     : middle;
      }
      const int64_t count = count_above(keys, n, static_cast<int32_t>(middle));
      // As a number minus zero would not be below zero.
      if (count == k && middle != ordered(-0.0f)) {
        *ties = 0;
        return number_of(static_cast<int32_t>(middle));
      }
      if (count >= k) {
        low = middle + 1;
        all = count;
      } else {
        high = middle;
        more = count;
      }
    }
    *ties = k - more;
    return number_of(static_cast<int32_t>(low));
  }

  static int64_t count_above(const int32_t* keys, int64_t n, int32_t limit) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      count += keys[i] > limit;
    }
    return count;
  }

  // Keeps the keys of the numbers above a limit. Minus zero, below zero as an integer but not as a
  // number, becomes zero.
  int64_t above(const float* x, int64_t n, float limit) {
    int32_t* kept = keys_.get(std::max(n, kSample) + kSlack);
    int64_t count = 0, i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 edge = _mm512_set1_ps(limit);
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    for (; i + 16 <= n; i += 16) {
      const __m512 values = _mm512_loadu_ps(x + i);
      const __mmask16 larger = _mm512_cmp_ps_mask(values, edge, _CMP_GT_OQ);
      const __m512i bits = _mm512_castps_si512(_mm512_add_ps(values, _mm512_setzero_ps()));
      const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), positive);
      // To write part of a vector takes longer than all of it.
      const __m512i found = _mm512_maskz_compress_epi32(larger, _mm512_xor_si512(bits, flip));
      _mm512_storeu_si512(kept + count, found);
      count += __builtin_popcount(larger);
    }
#endif
    for (; i < n; ++i) {
      if (x[i] > limit) {
        kept[count++] = ordered(x[i] + 0.0f);
      }
    }
    return count;
  }

  int64_t indices(const float* x, int64_t n, float limit, int64_t ties, int64_t most,
                  int32_t* index) {
    int32_t* found = found_.get(most + kSlack);
    int64_t count = 0, i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 edge = _mm512_set1_ps(limit);
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto take = [&](__mmask16 taken) __attribute__((always_inline)) {
      _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(taken, place));
      count += __builtin_popcount(taken);
      place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    };
    for (; i + 16 <= n && ties > 0; i += 16) {
      const __m512 values = _mm512_loadu_ps(x + i);
      __mmask16 taken = _mm512_cmp_ps_mask(values, edge, _CMP_GT_OQ);
      __mmask16 equal = _mm512_cmp_ps_mask(values, edge, _CMP_EQ_OQ);
      for (; equal && ties > 0; equal &= equal - 1, --ties) {
        taken |= equal & -equal;
      }
      take(taken);
    }
    for (; i + 16 <= n; i += 16) {
      take(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), edge, _CMP_GT_OQ));
    }
#endif
    for (; i < n; ++i) {
      const bool tie = ties > 0 && x[i] == limit;
      ties -= tie;
      if (x[i] > limit || tie) {
        found[count++] = static_cast<int32_t>(i);
      }
    }
    std::copy(found, found + count, index);
    return count;
  }

  Buffer<int32_t> keys_, found_;
};

}  // namespace longswift
