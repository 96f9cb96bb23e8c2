// Largest products of rows with columns, whose scores are never kept.
#pragma once

#include "tile_unit.h"

namespace longswift {

// In the processor's unit for tiles, or by AVX-512's dot products, where it has one of them: inner
// dimensions as short as a head's leave a general product busy with loading and storing. Bytes are
// multiplied nowhere else, and left factors of theirs are `kByteOffset` larger than they count. While an
// object lives, its thread must not multiply by other means, and panels do not change.
template <typename F>
class ColumnMaxima {
  static constexpr bool kBytes = std::is_same_v<F, int8_t>;

 public:
  // What products are sums of.
  using Sum = std::conditional_t<kBytes, int32_t, float>;

  // Columns come in panels [dim, 64]; rows in multiples of 16.
  static constexpr int64_t kPanel = 64, kRows = 16;

  // Room for `count` columns that belong together.
  static int64_t columns_for(int64_t count) { return round_up(count, count <= 16 ? 16 : 32); }

  explicit ColumnMaxima(int64_t dim) : dim_(dim), unit_(fits(dim)) {}

  // The largest product of every 16 of `count` rows [dim], `step` apart, with each column of
  // [first, end), `[count / 16, *]`, rows `out_step` apart. Calls `meanwhile` now and then.
  template <typename Meanwhile>
  void of_rows(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
               int64_t end, float* out, int64_t out_step, Meanwhile&& meanwhile) const {
    if constexpr (kUnitOf<F>) {
      if (unit_.used()) {
        by_pairs(rows, step, count, nullptr, panels, first, end, nullptr,
                 [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                   meanwhile();
                   for (int tile = 0; tile < 2; ++tile, c += 16) {
                     if (c >= first && c < end) {
                       as_floats(best_of(scores[tile], 16)).store(out + r / 16 * out_step + c);
                     }
                   }
                 });
        return;
      }
    }
    by_products(rows, step, count, nullptr, panels, first, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const auto* scores) {
                  meanwhile();
                  for (int64_t i = 0; i < tall; i += kRows) {
                    for (int64_t l = 0; l < wide; l += kLanes) {
                      as_floats(best_of(scores + i * kPanel + l, kPanel))
                          .store(out + (r + i) / kRows * out_step + c + l);
                    }
                  }
                });
  }

  // The products themselves, `[count, *]`, rows `out_step` apart.
  void all(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first, int64_t end,
           float* out, int64_t out_step) const {
    const auto copy = [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const Sum* scores,
                          int64_t apart) {
      for (int64_t i = 0; i < tall; ++i) {
        std::copy(scores + i * apart, scores + i * apart + wide, out + (r + i) * out_step + c);
      }
    };
    if constexpr (kUnitOf<F>) {
      if (unit_.used()) {
        by_pairs(rows, step, count, nullptr, panels, first, end, nullptr,
                 [&](int64_t r, int64_t c, const Pair& scores) {
                   for (int tile = 0; tile < 2; ++tile, c += 16) {
                     if (c >= first && c < end) {
                       copy(r, 16, c, 16, scores[tile], 16);
                     }
                   }
                 });
        return;
      }
    }
    by_products(rows, step, count, nullptr, panels, first, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const auto* scores) {
                  copy(r, tall, c, wide, scores, kPanel);
                });
  }

  // Every `per` columns of [first, end), 16 or a multiple of 32, have `count` numbers of their own,
  // `out_step` apart, one for each row: its largest product with a column, `start[c]` larger. Calls
  // `meanwhile` now and then. If `only` lists some tiles of 16 rows, it is those of the list that are
  // counted and looked at; they keep their places.
  template <typename Meanwhile>
  void of_columns(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
                  int64_t end, int64_t per, const Sum* start, float* out, int64_t out_step,
                  Meanwhile&& meanwhile, const int32_t* only = nullptr) const {
    if constexpr (kUnitOf<F>) {
      if (unit_.used()) {
        Sums best[16];
        const auto both = [&](int i, const Pair& scores) __attribute__((always_inline)) {
          return larger(Sums::loadu(scores[0] + 16 * i), Sums::loadu(scores[1] + 16 * i));
        };
        if (per == 16) {
          by_pairs(rows, step, count, only, panels, first, end, start,
                   [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                     meanwhile();
                     for (int tile = 0; tile < 2; ++tile, c += 16) {
                       if (c >= first && c < end) {
#pragma GCC unroll 16
                         for (int i = 0; i < 16; ++i) {
                           best[i] = Sums::loadu(scores[tile] + 16 * i);
                         }
                         as_floats(max_of_each(best)).store(out + (c - first) / 16 * out_step + r);
                       }
                     }
                   });
          return;
        }
        if (per == 32) {
          by_pairs(rows, step, count, only, panels, first, end, start,
                   [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                     meanwhile();
#pragma GCC unroll 16
                     for (int i = 0; i < 16; ++i) {
                       best[i] = both(i, scores);
                     }
                     as_floats(max_of_each(best)).store(out + (c - first) / 32 * out_step + r);
                   });
          return;
        }
        int64_t inside = 0;
        float* to = out;
        by_pairs(rows, step, count, only, panels, first, end, start,
                 [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                   meanwhile();
#pragma GCC unroll 16
                   for (int i = 0; i < 16; ++i) {
                     const Sums x = both(i, scores);
                     best[i] = inside == 0 ? x : larger(best[i], x);
                   }
                   inside += 32;
                   if (inside == per) {
                     as_floats(max_of_each(best)).store(to + r);
                     inside = 0;
                     to += out_step;
                   }
                   if (c + 32 >= end) {
                     to = out;
                   }
                 });
        return;
      }
    }
    by_products(rows, step, count, only, panels, first, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const auto* scores) {
                  meanwhile();
                  for (int64_t l = 0; l < wide; l += kColumns) {
                    const int64_t place = c + l - first;
                    float* to = out + place / per * out_step + r;
                    for (int64_t i = 0; i < tall; i += kLanes) {
                      const Vec best = best_of_each(scores + i * kPanel + l, start + c + l);
                      (place % per == 0 ? best : larger(Vec::loadu(to + i), best)).store(to + i);
                    }
                  }
                });
  }

  // Of every `per` of the first `end` columns, 8 or fewer, a power of two, the largest product with
  // each of 16 rows, `start[c]` larger; `end` is a multiple of 32. Where one exceeds the limits of these
  // columns, which are equal, calls `use` with the first row, the number of the group of columns and the
  // 16, aligned; of no other are the 16 worked out. Calls `meanwhile` now and then.
  template <typename Meanwhile, typename Use>
  void of_groups(const F* rows, int64_t step, int64_t count, const F* panels, int64_t end,
                 int64_t per, const Sum* start, const float* limits, Meanwhile&& meanwhile,
                 Use&& use) const {
    const auto with = [&](auto known) {
      of_groups<known>(rows, step, count, panels, end, start, limits, meanwhile, use);
    };
    switch (per) {
      case 1: return with(std::integral_constant<int, 1>());
      case 2: return with(std::integral_constant<int, 2>());
      case 4: return with(std::integral_constant<int, 4>());
      default: return with(std::integral_constant<int, 8>());
    }
  }

 private:
  static constexpr int64_t kTall = 64;

  template <int per, typename Meanwhile, typename Use>
  void of_groups(const F* rows, int64_t step, int64_t count, const F* panels, int64_t end,
                 const Sum* start, const float* limits, Meanwhile&& meanwhile, Use&& use) const {
    alignas(64) float numbers[kRows];
    const auto use_tile = [&](int64_t r, int64_t c, const Sum* scores, int64_t apart)
        __attribute__((always_inline)) {
      for (int64_t l = 0; l < kColumns; l += kLanes) {
        const Sums top = best_of(scores + l, apart) + Sums::loadu(start + c + l);
        uint32_t above = which_above(as_floats(top), Vec::loadu(limits + c + l));
        while (above != 0) {
          const int64_t lane = __builtin_ctz(above) / per * per;
          largest_of_group<per>(scores + l + lane, apart, start + c + l + lane, numbers);
          use(r, (c + l + lane) / per, numbers);
          above &= ~(((1u << per) - 1) << lane);
        }
      }
    };
    if constexpr (kUnitOf<F>) {
      if (unit_.used()) {
        by_pairs(rows, step, count, nullptr, panels, 0, end, nullptr,
                 [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                   meanwhile();
                   for (int tile = 0; tile < 2; ++tile) {
                     use_tile(r, c + tile * kColumns, scores[tile], kColumns);
                   }
                 });
        return;
      }
    }
    by_products(rows, step, count, nullptr, panels, 0, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const auto* scores) {
                  meanwhile();
                  for (int64_t i = 0; i < tall; i += kRows) {
                    for (int64_t l = 0; l < wide; l += kColumns) {
                      use_tile(r + i, c + l, scores + i * kPanel + l, kPanel);
                    }
                  }
                });
  }

  // Of each of 16 rows the largest of a group's scores, `start` larger. Four rows at a time: gathers of
  // columns take some processors four times as long.
  template <int per>
  [[gnu::always_inline]] static void largest_of_group(const Sum* scores, int64_t apart,
                                                      const Sum* start, float* out) {
    const auto largest = [&](int64_t i) __attribute__((always_inline)) {
      const Sum* of = scores + i * apart;
      if constexpr (per == 1) {
        const Four all = four(of[0], of[apart], of[2 * apart], of[3 * apart]);
        return floats_of(plus(all, four(start[0], start[0], start[0], start[0])));
      } else if constexpr (per == 2) {
        const Four one = two_pairs(of, of + apart), two = two_pairs(of + 2 * apart, of + 3 * apart);
        const Four both = two_pairs(start, start);
        const Four even = plus(_mm_shuffle_ps(one, two, 0x88), _mm_shuffle_ps(both, both, 0x88));
        const Four odd = plus(_mm_shuffle_ps(one, two, 0xdd), _mm_shuffle_ps(both, both, 0xdd));
        return floats_of(larger_of(even, odd));
      } else {
        const auto row = [&](int64_t r) __attribute__((always_inline)) {
          const Sum* at = of + r * apart;
          Four best = plus(load(at), load(start));
          if constexpr (per == 8) {
            best = larger_of(best, plus(load(at + 4), load(start + 4)));
          }
          return best;
        };
        const Four a = row(0), b = row(1), c = row(2), d = row(3);
        const Four ab = larger_of(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        const Four cd = larger_of(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        const Four low = _mm_shuffle_ps(ab, cd, 0x44), high = _mm_shuffle_ps(ab, cd, 0xee);
        return floats_of(larger_of(low, high));
      }
    };
#if defined(CPU_CAPABILITY_AVX512)
    // In one piece: what is stored in four would have to arrive before it is read in one.
    const auto two = [&](int64_t i) __attribute__((always_inline)) {
      return _mm256_set_m128(largest(i + 4), largest(i));
    };
    _mm512_store_ps(out, _mm512_insertf32x8(_mm512_castps256_ps512(two(0)), two(8), 1));
#else
    for (int64_t i = 0; i < kRows; i += 4) {
      _mm_storeu_ps(out + i, largest(i));
    }
#endif
  }

  // Four sums, whatever their type.
  using Four = __m128;
  static constexpr bool kWhole = !std::is_same_v<Sum, float>;

  [[gnu::always_inline]] static Four load(const Sum* x) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(x));
  }
  [[gnu::always_inline]] static Four two_pairs(const Sum* low, const Sum* high) {
    const __m128d first = _mm_load_sd(reinterpret_cast<const double*>(low));
    return _mm_castpd_ps(_mm_loadh_pd(first, reinterpret_cast<const double*>(high)));
  }
  [[gnu::always_inline]] static Four four(Sum a, Sum b, Sum c, Sum d) {
    if constexpr (kWhole) {
      return _mm_castsi128_ps(_mm_setr_epi32(a, b, c, d));
    } else {
      return _mm_setr_ps(a, b, c, d);
    }
  }
  [[gnu::always_inline]] static Four plus(const Four& a, const Four& b) {
    if constexpr (kWhole) {
      return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_castps_si128(b)));
    } else {
      return _mm_add_ps(a, b);
    }
  }
  [[gnu::always_inline]] static Four larger_of(const Four& a, const Four& b) {
    if constexpr (kWhole) {
      return _mm_castsi128_ps(_mm_max_epi32(_mm_castps_si128(a), _mm_castps_si128(b)));
    } else {
      return _mm_max_ps(a, b);
    }
  }
  [[gnu::always_inline]] static Four floats_of(const Four& x) {
    return kWhole ? _mm_cvtepi32_ps(_mm_castps_si128(x)) : x;
  }

  // Calls `use` with the products of some rows and the columns of a panel: the first row, how many, the
  // first column, how many.
  template <typename Use>
  void by_products(const F* rows, int64_t step, int64_t count, const int32_t* only, const F* panels,
                   int64_t first, int64_t end, Use&& use) const {
    if constexpr (kBytes) {
      TORCH_CHECK(false, "expected a unit that multiplies bytes, got none");
    } else {
      static thread_local Buffer<float> buffer;
      float* scores = buffer.get(kTall * kPanel);
      const int64_t most = only == nullptr ? kTall : kRows;
      for (int64_t i = 0; i < count; i += most) {
        const int64_t tall = std::min(most, count - i);
        const int64_t r = only == nullptr ? i : only[i / kRows] * kRows;
        for (int64_t c = first; c < end;) {
          const int64_t wide = std::min(kPanel - c % kPanel, end - c);
          multiply<F>(tall, wide, dim_, rows + r * step, step, columns_at(panels, c), kPanel, scores,
                      kPanel);
          use(r, tall, c, wide, scores);
          c += wide;
        }
      }
    }
  }

  // What a whole number of groups of columns has in common.
  static constexpr int64_t kColumns = 16;

  using Sums = at::vec::Vectorized<Sum>;

  // The largest of `kRows` vectors.
  [[gnu::always_inline]] static Sums best_of(const Sum* scores, int64_t step) {
    Sums even = Sums::loadu(scores), odd = Sums::loadu(scores + step);
#pragma GCC unroll 8
    for (int64_t i = 2; i < kRows; i += 2) {
      even = larger(even, Sums::loadu(scores + i * step));
      odd = larger(odd, Sums::loadu(scores + (i + 1) * step));
    }
    return larger(even, odd);
  }

  // The largest of `kColumns` columns in each of as many rows of scores as there are lanes.
  static Vec best_of_each(const float* scores, const float* start) {
    Vec best[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const float* of_row = scores + i * kPanel;
      best[i] = Vec::loadu(of_row) + Vec::loadu(start);
      for (int64_t l = kLanes; l < kColumns; l += kLanes) {
        best[i] = larger(best[i], Vec::loadu(of_row + l) + Vec::loadu(start + l));
      }
    }
    return max_of_each(best);
  }

  // A column takes 32 bits of a panel's row: one number, two of 16 or four of 8.
  const F* columns_at(const F* panels, int64_t c) const {
    const int64_t inside = c % kPanel;
    return panels + (c - inside) * dim_ + inside * static_cast<int64_t>(sizeof(float) / sizeof(F));
  }

  // Scores of 16 rows, in two times 16 columns.
  using Pair = Sum[2][256];

  // Calls `use` with the row, the column, a multiple of 32, and the scores of every pair, which start
  // at zero or at what is given for each column.
  template <typename Use>
  [[gnu::always_inline]] void by_pairs(const F* rows, int64_t step, int64_t count,
                                       const int32_t* only, const F* panels, int64_t first,
                                       int64_t end, const Sum* start, Use&& use) const {
    if (count == 0) {
      return;
    }
#if defined(LONGSWIFT_TILES)
    if (dim_ == kInner) {
      by_tiles<1>(rows, step, count, only, panels, first, end, start, use);
    } else if (dim_ == 2 * kInner) {
      by_tiles<2>(rows, step, count, only, panels, first, end, start, use);
    } else {
      by_tiles<0>(rows, step, count, only, panels, first, end, start, use);
    }
#elif defined(LONGSWIFT_BYTE_DOTS) || defined(LONGSWIFT_PAIR_DOTS)
    by_dots(rows, step, count, only, panels, first, end, start, use);
#endif
  }

#if defined(LONGSWIFT_TILES)
  static constexpr int64_t kInner = kDeepOf<F>;

  // A pair is stored while the next is multiplied, and used while that is stored: neither waits for the
  // other. Tiles of rows stay where they are for inner dimensions of `held` tiles.
  template <int held, typename Use>
  [[gnu::always_inline]] void by_tiles(const F* rows, int64_t step, int64_t count,
                                       const int32_t* only, const F* panels, int64_t first,
                                       int64_t end, const Sum* start, Use&& use) const {
    const int64_t apart = step * sizeof(F), begin = first / 32 * 32;
    alignas(64) Pair scores[2];
    int64_t row[2], column[2], done = 0;
    // The compiler does not know what tiles are loaded from.
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t r = only == nullptr ? i : only[i / 16] * 16;
      const F* left = rows + r * step;
      if constexpr (held >= 1) {
        tile::load<4>(left, apart);
      }
      if constexpr (held >= 2) {
        tile::load<5>(left + kInner, apart);
      }
      for (int64_t c = begin; c < end; c += 32, ++done) {
        const F* right = columns_at(panels, c);
        const Sum* from = start == nullptr ? nullptr : start + c;
        const auto at = [&](int64_t slot) __attribute__((always_inline)) {
          if (done >= 2) {
            use(row[slot], column[slot], scores[slot]);
          }
          row[slot] = r, column[slot] = c;
        };
        if (done % 2 == 0) {
          multiply_pair<held, 0>(left, apart, right, from);
          if (done >= 1) {
            store_pair<1>(scores[1]);
          }
          at(0);
        } else {
          multiply_pair<held, 1>(left, apart, right, from);
          store_pair<0>(scores[0]);
          at(1);
        }
      }
    }
    const int64_t last = (done - 1) % 2;
    if (done >= 2) {
      use(row[1 - last], column[1 - last], scores[1 - last]);
    }
    if (last == 0) {
      store_pair<0>(scores[0]);
    } else {
      store_pair<1>(scores[1]);
    }
    use(row[last], column[last], scores[last]);
  }

  template <int held, int slot>
  [[gnu::always_inline]] void multiply_pair(const F* left, int64_t apart, const F* panel,
                                            const Sum* start) const {
    constexpr int64_t along = kPanel * sizeof(Sum), next = along * 16;
    constexpr int one = 2 * slot, two = one + 1;
    const char* right = reinterpret_cast<const char*>(panel);
    if (start == nullptr) {
      tile::zero<one>();
      tile::zero<two>();
    } else {
      // The same 16 numbers for every row.
      tile::load<one>(start, 0);
      tile::load<two>(start + 16, 0);
    }
    if constexpr (held >= 1) {
      tile::load<6>(right, along);
      tile::multiply<one, 4, 6, F>();
      tile::load<7>(right + 64, along);
      tile::multiply<two, 4, 7, F>();
    }
    if constexpr (held >= 2) {
      tile::load<6>(right + next, along);
      tile::multiply<one, 5, 6, F>();
      tile::load<7>(right + next + 64, along);
      tile::multiply<two, 5, 7, F>();
    }
    if constexpr (held == 0) {
      for (int64_t d = 0; d < dim_; d += kInner, right += next) {
        tile::load<4>(left + d, apart);
        tile::load<6>(right, along);
        tile::multiply<one, 4, 6, F>();
        tile::load<7>(right + 64, along);
        tile::multiply<two, 4, 7, F>();
      }
    }
  }

  template <int slot>
  [[gnu::always_inline]] static void store_pair(Pair& scores) {
    tile::store<2 * slot>(scores[0], 64);
    tile::store<2 * slot + 1>(scores[1], 64);
  }
#elif defined(LONGSWIFT_BYTE_DOTS) || defined(LONGSWIFT_PAIR_DOTS)
  template <typename Use>
  [[gnu::always_inline]] void by_dots(const F* rows, int64_t step, int64_t count,
                                      const int32_t* only, const F* panels, int64_t first,
                                      int64_t end, const Sum* start, Use&& use) const {
    constexpr int64_t along = kPanel * sizeof(Sum);
    const int64_t begin = first / 32 * 32, steps = dim_ * sizeof(F) / sizeof(Sum);
    const Sum* from = starts_of_dots(panels, begin, end, start);
    alignas(64) Pair scores;
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t r = only == nullptr ? i : only[i / 16] * 16;
      for (int64_t c = begin; c < end; c += 32) {
        const F* right = columns_at(panels, c);
        for (int64_t half = 0; half < 16; half += dots::kTall) {
          dots::Sums<F> sums[dots::kTall][2];
#pragma GCC unroll 8
          for (int j = 0; j < dots::kTall; ++j) {
            sums[j][0] = Sums::loadu(from + c - begin);
            sums[j][1] = Sums::loadu(from + c - begin + 16);
          }
          dots::add_products<F>(sums, rows + (r + half) * step, step * sizeof(F), right, along, 64,
                                steps);
#pragma GCC unroll 8
          for (int j = 0; j < dots::kTall; ++j) {
            Sums(sums[j][0]).store(scores[0] + 16 * (half + j));
            Sums(sums[j][1]).store(scores[1] + 16 * (half + j));
          }
        }
        use(r, c, scores);
      }
    }
  }

  // What dot products of columns [begin, end) start from, for pairs of tiles: what they are to start
  // from, less what left factors are too large by.
  const Sum* starts_of_dots(const F* panels, int64_t begin, int64_t end, const Sum* start) const {
    Excess& mine = of_thread<Excess>();
    const int64_t whole = round_up(end - begin, 32);
    if (excess_of_ != panels || excess_begin_ != begin || excess_end_ != end) {
      excess_of_ = panels, excess_begin_ = begin, excess_end_ = end;
      find_excess(panels, begin, end, mine.excess.get(whole));
    }
    const Sum* excess = mine.excess.data();
    if (start == nullptr) {
      return excess;
    }
    Sum* from = mine.from.get(whole);
    for (int64_t c = 0; c < end - begin; c += kLanes) {
      (Sums::loadu(excess + c) + Sums::loadu(start + begin + c)).store(from + c);
    }
    return from;
  }

  // Less than nothing, for offsets of left factors.
  void find_excess(const F* panels, int64_t begin, int64_t end, Sum* excess) const {
    std::fill(excess, excess + round_up(end - begin, 32), Sum(0));
#if defined(LONGSWIFT_BYTE_DOTS)
    if constexpr (kBytes) {
      const __m512i offset = _mm512_set1_epi8(static_cast<char>(kByteOffset));
      for (int64_t c = begin; c < end; c += kLanes) {
        const auto* right = reinterpret_cast<const char*>(columns_at(panels, c));
        __m512i sum = _mm512_setzero_si512();
        for (int64_t d = 0; d < dim_; d += 4, right += kPanel * sizeof(Sum)) {
          sum = _mm512_dpbusd_epi32(sum, offset, _mm512_loadu_si512(right));
        }
        (Sums(0) - Sums(sum)).store(excess + c - begin);
      }
    }
#endif
  }

  // Memory of a thread, which no two objects use at a time.
  struct Excess {
    Buffer<Sum> excess, from;
  };
  // The columns whose excess is known; they do not change while an object lives.
  mutable const F* excess_of_ = nullptr;
  mutable int64_t excess_begin_ = 0, excess_end_ = 0;
#endif

  static bool fits(int64_t dim) {
    return dim % kDeepOf<F> == 0 && TileUnit::there<F>();
  }

  const int64_t dim_;
  const TileUnit unit_;
};

}  // namespace longswift
