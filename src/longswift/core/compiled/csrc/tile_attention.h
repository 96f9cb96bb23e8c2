// Softmax attention of 32 rows at a time in the processor's tile unit, or by dot products: scores and
// probabilities of a few keys never leave the first cache.
#pragma once

#include "tile_unit.h"

namespace longswift {

// Of a block of rows: weighted sums of values [kRows, value_dim], sums of weights [kRows, 16] whose
// lanes are to be added up, and the base-two logarithms [kRows] that weights are relative to.
struct TileState {
  float *part, *sums, *tops;
};

#if defined(LONGSWIFT_PAIRS)

// Scores are scaled, and those beyond every number leave NaN. A row's weights may exceed one: its
// logarithm is raised, and what it has summed so far shrunk, only when they would by far.
class TileAttention {
 public:
  using Factor = at::BFloat16;
  static constexpr int64_t kRows = 32, kLines = 16;
  // Keys come in groups as large, packed anew from each on.
  static constexpr int64_t kGroup = 32;

  TileAttention(int64_t dim, int64_t value_dim, float scale)
      : dim_(dim), value_dim_(value_dim), scale_(scale * kLog2e), mine_(of_thread<Space>()) {}

  static bool fits(int64_t dim, int64_t value_dim) {
    return dim % kDeep == 0 && value_dim % kDeep == 0 && TileUnit::there<Factor>();
  }

  // Rows [count, dim] to `round_up(count, kGroup)` right columns: 16 keys after another, in tiles.
  void pack_keys(const Factor* in, int64_t step, int64_t count, Factor* out) const {
    for (int64_t i = 0; i < round_up(count, kGroup); i += 16) {
      for (int64_t d = 0; d < dim_; d += kDeep) {
        transpose(in + i * step + d, step, std::clamp<int64_t>(count - i, 0, 16),
                  out + i * dim_ + d * 16);
      }
    }
  }

  // Rows [count, value_dim] to `round_up(count, kGroup)` right rows: 32 keys after another, in tiles.
  void pack_values(const Factor* in, int64_t step, int64_t count, Factor* out) const {
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t i = 0; i < round_up(count, kGroup); i += 2) {
      Factor* to = out + i / kGroup * kGroup * value_dim_ + i % kGroup * 16;
      for (int64_t d = 0; d < value_dim_; d += 32, to += 32 * kGroup) {
        const auto* at = in + i * step + d;
        const __m512i even = i < count ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
        const __m512i odd = i + 1 < count ? _mm512_loadu_si512(at + step) : _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi16(even, odd);
        const __m512i high = _mm512_unpackhi_epi16(even, odd);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, front, high));
        _mm512_storeu_si512(to + 16 * kGroup, _mm512_permutex2var_epi64(low, back, high));
      }
    }
  }

  void begin(const TileState& state) const {
    std::fill(state.part, state.part + kRows * value_dim_, 0.0f);
    std::fill(state.sums, state.sums + kRows * kLines, 0.0f);
    std::fill(state.tops, state.tops + kRows, kLowest);
  }

  // Adds packed keys [from, end) to what the `kRows` rows [kRows, dim] have seen; row i sees those of
  // [low + i, high + i). `from` is a multiple of `kGroup`.
  void add(const Factor* rows, const TileState& state, const Factor* keys, const Factor* values,
           int64_t from, int64_t end, int64_t low, int64_t high) const {
    by_depth<false>(rows, state, keys, values, from, end, low, high, nullptr);
  }

  // The same for keys [from, end) that every row sees.
  void add(const Factor* rows, const TileState& state, const Factor* keys, const Factor* values,
           int64_t from, int64_t end) const {
    add(rows, state, keys, values, from, end, -kFarthest, kFarthest);
  }

  // The same for keys whose scores are `bias` [end - from] larger, as base-two logarithms.
  void add_biased(const Factor* rows, const TileState& state, const Factor* keys,
                  const Factor* values, int64_t from, int64_t end, const float* bias) const {
    by_depth<true>(rows, state, keys, values, from, end, -kFarthest, kFarthest, bias);
  }

  // Sum of a row's weights, relative to its logarithm.
  static float total(const TileState& state, int64_t row) {
    return sum_of(Vec::loadu(state.sums + row * kLines));
  }

 private:
  static constexpr int64_t kKeys = 64;
  static constexpr int64_t kFarthest = int64_t{1} << 40;
  // Weights of up to 2 ** 8 are as exact as those below one.
  static constexpr float kSlack = 8.0f;

  struct Space {
    alignas(64) float scores[kRows * kKeys];
    alignas(64) Factor probs[kRows * kKeys];
  };

  // 16 rows of 32 numbers to 16 pairs of numbers of each.
  [[gnu::always_inline]] static void transpose(const Factor* in, int64_t step, int64_t rows,
                                               Factor* out) {
    __m512i a[16], b[16];
    if (rows == 16) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_loadu_si512(in + i * step);
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        a[i] = i < rows ? _mm512_loadu_si512(in + i * step) : _mm512_setzero_si512();
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm512_storeu_si512(out + 32 * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_si512(out + 32 * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
  }

  // 2 ** x for x <= kSlack, with a relative error of 1e-4: what is rounded to bf16 need not be exact.
  static __m512 exp2(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0.07944023f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.22449434f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69606566f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.99992522f));
    return _mm512_scalef_ps(y, x);
  }

  template <bool biased>
  void by_depth(const Factor* rows, const TileState& state, const Factor* keys,
                const Factor* values, int64_t from, int64_t end, int64_t low, int64_t high,
                const float* bias) const {
    if (dim_ == kDeep) {
      run<1, biased>(rows, state, keys, values, from, end, low, high, bias);
    } else if (dim_ == 2 * kDeep) {
      run<2, biased>(rows, state, keys, values, from, end, low, high, bias);
    } else if (dim_ == 4 * kDeep) {
      run<4, biased>(rows, state, keys, values, from, end, low, high, bias);
    } else {
      run<0, biased>(rows, state, keys, values, from, end, low, high, bias);
    }
  }

  template <int depth, bool biased>
  void run(const Factor* rows, const TileState& state, const Factor* keys, const Factor* values,
           int64_t from, int64_t end, int64_t low, int64_t high, const float* bias) const {
    for (int64_t k = from; k < end; k += kKeys) {
      const int64_t groups = std::min(kKeys / kGroup, (end - k + kGroup - 1) / kGroup);
      score<depth>(rows, keys + k * dim_, groups);
      if (low + kRows - 1 > k || std::min(high, end) < k + groups * kGroup) {
        hide(groups, low - k, high - k, end - k);
      }
      const float* more = biased ? bias + k - from : nullptr;
      for (int64_t r = 0; r < kRows; r += kLines) {
        raise<biased>(state, r, groups, more);
      }
      for (int64_t i = 0; i < kRows; ++i) {
        weigh<biased>(state, i, groups, more);
      }
      sum(state.part, values + k * value_dim_, groups);
    }
  }

#if defined(LONGSWIFT_TILES)
  // Scores of `kRows` rows and some groups of keys. The compiler does not know what tiles are loaded
  // from. The scores of some rows are stored while those of others are multiplied.
  template <int depth>
  void score(const Factor* rows, const Factor* keys, int64_t groups) const {
    const int64_t dim = depth > 0 ? depth * kDeep : dim_;
    asm volatile("" ::: "memory");
    multiply_pair<depth, 0>(rows, keys);
    for (int64_t g = 0; g < groups; ++g) {
      float* to = mine_.scores + g * kGroup;
      multiply_pair<depth, 1>(rows + 16 * dim, keys);
      store_pair<0>(to);
      if (g + 1 < groups) {
        keys += kGroup * dim;
        multiply_pair<depth, 0>(rows, keys);
      }
      store_pair<1>(to + 16 * kKeys);
    }
  }

  // 16 rows and a group of keys.
  template <int depth, int slot>
  [[gnu::always_inline]] void multiply_pair(const Factor* rows, const Factor* keys) const {
    const int64_t dim = depth > 0 ? depth * kDeep : dim_, apart = dim * sizeof(Factor);
    tile::zero<2 * slot>();
    tile::zero<2 * slot + 1>();
#pragma GCC unroll 4
    for (int64_t d = 0; d < dim; d += kDeep) {
      tile::load<4 + slot>(rows + d, apart);
      tile::load<6>(keys + d * 16, 64);
      tile::multiply<2 * slot, 4 + slot, 6>();
      tile::load<7>(keys + (dim + d) * 16, 64);
      tile::multiply<2 * slot + 1, 4 + slot, 7>();
    }
  }

  template <int slot>
  [[gnu::always_inline]] static void store_pair(float* to) {
    tile::store<2 * slot>(to, kKeys * sizeof(float));
    tile::store<2 * slot + 1>(to + 16, kKeys * sizeof(float));
  }
#else
  // Scores of `kRows` rows and some groups of keys.
  template <int depth>
  void score(const Factor* rows, const Factor* keys, int64_t groups) const {
    const int64_t dim = depth > 0 ? depth * kDeep : dim_;
    for (int64_t g = 0; g < groups; ++g, keys += kGroup * dim) {
      for (int64_t i = 0; i < kRows; i += dots::kTall) {
        dots::Sums<Factor> sums[dots::kTall][2];
        for (auto& of_row : sums) {
          of_row[0] = of_row[1] = _mm512_setzero_ps();
        }
        dots::add_products<Factor>(sums, rows + i * dim, dim * sizeof(Factor), keys, 64,
                                   16 * dim * sizeof(Factor), dim / 2);
        store(sums, mine_.scores + i * kKeys + g * kGroup, kKeys);
      }
    }
  }

  [[gnu::always_inline]] static void store(const dots::Sums<Factor> (&sums)[dots::kTall][2],
                                           float* to, int64_t step) {
    for (int i = 0; i < dots::kTall; ++i) {
      _mm512_storeu_ps(to + i * step, sums[i][0]);
      _mm512_storeu_ps(to + i * step + 16, sums[i][1]);
    }
  }
#endif

  // Hides the keys before low + i, from high + i on and from `end` on from row i.
  void hide(int64_t groups, int64_t low, int64_t high, int64_t end) const {
    const __m512 hidden = _mm512_set1_ps(kHidden);
    for (int64_t c = 0; c < groups * kGroup; c += kLines) {
      if (low + kRows - 1 <= c && std::min(high, end) >= c + kLines) {
        continue;
      }
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t first = std::clamp<int64_t>(low + i - c, 0, kLines);
        const int64_t last = std::clamp<int64_t>(std::min(high + i, end) - c, 0, kLines);
        const uint32_t seen = ((1u << last) - 1) & ~((1u << first) - 1);
        float* at = mine_.scores + i * kKeys + c;
        _mm512_store_ps(at, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(at)));
      }
    }
  }

  // Raises the logarithms of 16 rows to what their largest scores ask for.
  template <bool biased>
  [[gnu::always_inline]] void raise(const TileState& state, int64_t first, int64_t groups,
                                    const float* bias) const {
    const __m512 by = _mm512_set1_ps(scale_);
    Vec best[kLines];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLines; ++i) {
      const float* at = mine_.scores + (first + i) * kKeys;
      const auto scores = [&](int64_t c) {
        const __m512 x = _mm512_load_ps(at + c);
        return biased ? _mm512_fmadd_ps(x, by, _mm512_loadu_ps(bias + c)) : x;
      };
      __m512 x = _mm512_max_ps(scores(0), scores(kLines));
      for (int64_t c = kGroup; c < groups * kGroup; c += kGroup) {
        x = _mm512_max_ps(x, _mm512_max_ps(scores(c), scores(c + kLines)));
      }
      best[i] = x;
    }
    __m512 top = max_of_each(best);
    if constexpr (!biased) {
      top = _mm512_mul_ps(top, by);
    }
    const __m512 before = _mm512_loadu_ps(state.tops + first);
    uint32_t rows =
        _mm512_cmp_ps_mask(top, _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
    if (rows == 0) {
      return;
    }
    const __m512 now = _mm512_mask_mov_ps(before, rows, top);
    _mm512_storeu_ps(state.tops + first, now);
    float shrink[kLines];
    _mm512_storeu_ps(shrink, exp2(_mm512_sub_ps(before, now)));
    for (; rows != 0; rows &= rows - 1) {
      const int64_t i = __builtin_ctz(rows);
      multiply_by(shrink[i], state.sums + (first + i) * kLines, kLines);
      multiply_by(shrink[i], state.part + (first + i) * value_dim_, value_dim_);
    }
  }

  static void multiply_by(float factor, float* x, int64_t n) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < n; i += kLines) {
      _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), by));
    }
  }

  // Turns a row's scores into weights, and adds those up.
  template <bool biased>
  [[gnu::always_inline]] void weigh(const TileState& state, int64_t row, int64_t groups,
                                    const float* bias) const {
    const __m512 by = _mm512_set1_ps(scale_), top = _mm512_set1_ps(state.tops[row]);
    const float* at = mine_.scores + row * kKeys;
    Factor* to = mine_.probs + row * kKeys;
    __m512 total = _mm512_loadu_ps(state.sums + row * kLines);
    const auto weights = [&](int64_t c) {
      const __m512 x = _mm512_load_ps(at + c);
      return exp2(biased ? _mm512_sub_ps(_mm512_fmadd_ps(x, by, _mm512_loadu_ps(bias + c)), top)
                         : _mm512_fmsub_ps(x, by, top));
    };
    for (int64_t c = 0; c < groups * kGroup; c += kGroup) {
      const __m512 left = weights(c), right = weights(c + kLines);
      total = _mm512_add_ps(total, _mm512_add_ps(left, right));
      _mm512_store_si512(to + c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left)));
    }
    _mm512_storeu_ps(state.sums + row * kLines, total);
  }

#if defined(LONGSWIFT_TILES)
  // Adds weighted values.
  void sum(float* part, const Factor* values, int64_t groups) const {
    const int64_t along = value_dim_ * sizeof(float), apart = kKeys * sizeof(Factor);
    asm volatile("" ::: "memory");
    for (int64_t d = 0; d < value_dim_; d += 32, part += 32) {
      float* below = part + 16 * value_dim_;
      tile::load<0>(part, along);
      tile::load<1>(part + 16, along);
      tile::load<2>(below, along);
      tile::load<3>(below + 16, along);
      for (int64_t g = 0; g < groups; ++g) {
        const Factor* probs = mine_.probs + g * kGroup;
        const Factor* right = values + (g * value_dim_ + d) * kGroup;
        tile::load<4>(probs, apart);
        tile::load<6>(right, 64);
        tile::multiply<0, 4, 6>();
        tile::load<7>(right + 16 * kGroup, 64);
        tile::multiply<1, 4, 7>();
        tile::load<5>(probs + 16 * kKeys, apart);
        tile::multiply<2, 5, 6>();
        tile::multiply<3, 5, 7>();
      }
      tile::store<0>(part, along);
      tile::store<1>(part + 16, along);
      tile::store<2>(below, along);
      tile::store<3>(below + 16, along);
    }
    asm volatile("" ::: "memory");
  }
#else
  // Adds weighted values.
  void sum(float* part, const Factor* values, int64_t groups) const {
    for (int64_t d = 0; d < value_dim_; d += 32) {
      for (int64_t i = 0; i < kRows; i += dots::kTall) {
        float* to = part + i * value_dim_ + d;
        dots::Sums<Factor> sums[dots::kTall][2];
        for (int r = 0; r < dots::kTall; ++r) {
          sums[r][0] = _mm512_loadu_ps(to + r * value_dim_);
          sums[r][1] = _mm512_loadu_ps(to + r * value_dim_ + 16);
        }
        for (int64_t g = 0; g < groups; ++g) {
          dots::add_products<Factor>(sums, mine_.probs + i * kKeys + g * kGroup,
                                     kKeys * sizeof(Factor), values + (g * value_dim_ + d) * kGroup, 64,
                                     16 * kGroup * sizeof(Factor), kGroup / 2);
        }
        store(sums, to, value_dim_);
      }
    }
  }
#endif

  const int64_t dim_, value_dim_;
  const float scale_;
  Space& mine_;
};

#endif

// Whether products of such factors go this way, where there is one.
template <typename F>
bool takes_tiles(int64_t dim, int64_t value_dim) {
#if defined(LONGSWIFT_PAIRS)
  return std::is_same_v<F, at::BFloat16> && TileAttention::fits(dim, value_dim);
#else
  return false;
#endif
}

}  // namespace longswift
