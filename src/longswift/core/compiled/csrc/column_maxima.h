// Largest products of rows with columns, whose scores are never kept.
#pragma once

#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LONGSWIFT_TILES 1
#endif

namespace longswift {

// In the processor's tile unit where it has one for bf16: inner dimensions as short as a head's
// leave a general product busy with loading and storing. While an object lives, its thread must not
// multiply by other means.
template <typename F>
class ColumnMaxima {
 public:
  // Columns come in panels [dim, 64]; rows in multiples of 16.
  static constexpr int64_t kPanel = 64, kRows = 16;

  // Room for `count` columns that belong together.
  static int64_t columns_for(int64_t count) { return round_up(count, count <= 16 ? 16 : 32); }

  explicit ColumnMaxima(int64_t dim) : dim_(dim), tiles_(fits(dim)) {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      // Ends the configuration that other products left.
      at::native::cpublas::brgemm_release();
      alignas(64) static constexpr Configuration whole;
      _tile_loadconfig(&whole);
    }
#endif
  }

  ~ColumnMaxima() {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      _tile_release();
    }
#endif
  }

  ColumnMaxima(const ColumnMaxima&) = delete;
  ColumnMaxima& operator=(const ColumnMaxima&) = delete;

  // The largest product of every 16 of `count` rows [dim], `step` apart, with each column of
  // [first, end), `[count / 16, *]`, rows `out_step` apart. Calls `meanwhile` now and then.
  template <typename Meanwhile>
  void of_rows(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
               int64_t end, float* out, int64_t out_step, Meanwhile&& meanwhile) const {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      by_tiles(rows, step, count, panels, first, end,
               [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                 meanwhile();
                 for (int tile = 0; tile < 2; ++tile, c += 16) {
                   if (c >= first && c < end) {
                     best_of(scores[tile], 16).store(out + r / 16 * out_step + c);
                   }
                 }
               });
      return;
    }
#endif
    by_products(rows, step, count, panels, first, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const float* scores) {
                  meanwhile();
                  for (int64_t i = 0; i < tall; i += kRows) {
                    for (int64_t l = 0; l < wide; l += kLanes) {
                      best_of(scores + i * kPanel + l, kPanel)
                          .store(out + (r + i) / kRows * out_step + c + l);
                    }
                  }
                });
  }

  // The products themselves, `[count, *]`, rows `out_step` apart.
  void all(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first, int64_t end,
           float* out, int64_t out_step) const {
    const auto copy = [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const float* scores,
                          int64_t apart) {
      for (int64_t i = 0; i < tall; ++i) {
        std::copy(scores + i * apart, scores + i * apart + wide, out + (r + i) * out_step + c);
      }
    };
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      by_tiles(rows, step, count, panels, first, end, [&](int64_t r, int64_t c, const Pair& scores) {
        for (int tile = 0; tile < 2; ++tile, c += 16) {
          if (c >= first && c < end) {
            copy(r, 16, c, 16, scores[tile], 16);
          }
        }
      });
      return;
    }
#endif
    by_products(rows, step, count, panels, first, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const float* scores) {
                  copy(r, tall, c, wide, scores, kPanel);
                });
  }

  // Every `per` columns of [first, end), 16 or a multiple of 32, have `count` numbers of their own,
  // `out_step` apart, one for each row: raises them to its largest product with a column, `less[c]`
  // smaller.
  void raise_rows(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
                  int64_t end, int64_t per, const float* less, float* out, int64_t out_step) const {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      const auto raise = [](float* at, const Vec* best) __attribute__((always_inline)) {
        larger(Vec::loadu(at), max_of_each(best)).store(at);
      };
      Vec best[16];
      if (per == 16) {
        by_tiles(rows, step, count, panels, first, end,
                 [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                   for (int tile = 0; tile < 2; ++tile, c += 16) {
                     if (c >= first && c < end) {
#pragma GCC unroll 16
                       for (int i = 0; i < 16; ++i) {
                         best[i] = Vec::loadu(scores[tile] + 16 * i) - Vec::loadu(less + c);
                       }
                       raise(out + (c - first) / 16 * out_step + r, best);
                     }
                   }
                 });
        return;
      }
      int64_t inside = 0;
      float* to = out;
      by_tiles(rows, step, count, panels, first, end,
               [&](int64_t r, int64_t c, const Pair& scores) __attribute__((always_inline)) {
                 const Vec left = Vec::loadu(less + c), right = Vec::loadu(less + c + 16);
#pragma GCC unroll 16
                 for (int i = 0; i < 16; ++i) {
                   const Vec x = larger(Vec::loadu(scores[0] + 16 * i) - left,
                                        Vec::loadu(scores[1] + 16 * i) - right);
                   best[i] = inside == 0 ? x : larger(best[i], x);
                 }
                 inside += 32;
                 if (inside == per) {
                   raise(to + r, best);
                   inside = 0;
                   to += out_step;
                 }
                 if (c + 32 >= end) {
                   to = out;
                 }
               });
      return;
    }
#endif
    by_products(rows, step, count, panels, first, end,
                [&](int64_t r, int64_t tall, int64_t c, int64_t wide, const float* scores) {
                  for (int64_t l = 0; l < wide; l += kColumns) {
                    float* to = out + (c + l - first) / per * out_step + r;
                    for (int64_t i = 0; i < tall; i += kLanes) {
                      raise_each(scores + i * kPanel + l, less + c + l, to + i);
                    }
                  }
                });
  }

 private:
  static constexpr int64_t kTall = 64;

  // Calls `use` with the products of some rows and the columns of a panel: the first row, how many, the
  // first column, how many.
  template <typename Use>
  void by_products(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
                   int64_t end, Use&& use) const {
    static thread_local Buffer<float> buffer;
    float* scores = buffer.get(kTall * kPanel);
    for (int64_t r = 0; r < count; r += kTall) {
      const int64_t tall = std::min(kTall, count - r);
      for (int64_t c = first; c < end;) {
        const int64_t wide = std::min(kPanel - c % kPanel, end - c);
        multiply<F>(tall, wide, dim_, rows + r * step, step, columns_at(panels, c), kPanel, scores,
                    kPanel);
        use(r, tall, c, wide, scores);
        c += wide;
      }
    }
  }

  // What a whole number of groups of columns has in common.
  static constexpr int64_t kColumns = 16;

  // The largest of `kRows` vectors.
  [[gnu::always_inline]] static Vec best_of(const float* scores, int64_t step) {
    Vec even = Vec::loadu(scores), odd = Vec::loadu(scores + step);
#pragma GCC unroll 8
    for (int64_t i = 2; i < kRows; i += 2) {
      even = larger(even, Vec::loadu(scores + i * step));
      odd = larger(odd, Vec::loadu(scores + (i + 1) * step));
    }
    return larger(even, odd);
  }

  // As many rows of scores as there are lanes, in `kColumns` columns.
  static void raise_each(const float* scores, const float* less, float* out) {
    Vec best[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const float* of_row = scores + i * kPanel;
      best[i] = Vec::loadu(of_row) - Vec::loadu(less);
      for (int64_t l = kLanes; l < kColumns; l += kLanes) {
        best[i] = larger(best[i], Vec::loadu(of_row + l) - Vec::loadu(less + l));
      }
    }
    larger(Vec::loadu(out), max_of_each(best)).store(out);
  }

  // A column takes 32 bits of a panel's row: one number, or two of 16.
  const F* columns_at(const F* panels, int64_t c) const {
    const int64_t inside = c % kPanel;
    return panels + (c - inside) * dim_ + inside * static_cast<int64_t>(sizeof(float) / sizeof(F));
  }

#if defined(LONGSWIFT_TILES)
  // Inner dimension of a tile of 16-bit factors.
  static constexpr int64_t kDeep = 32;

  struct Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  // Linux lets a process use tiles when it asks.
  static bool allowed() {
    constexpr int64_t ask = 0x1023, tile_data = 18;
    static const bool yes = syscall(SYS_arch_prctl, ask, tile_data) == 0;
    return yes;
  }

  // Scores of 16 rows, in two times 16 columns.
  using Pair = float[2][256];

  template <typename Use>
  [[gnu::always_inline]] void by_tiles(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
                int64_t end, Use&& use) const {
    const int64_t deep = dim_ / kDeep;
    if (count == 0) {
      return;
    }
    if (deep == 1) {
      by_tiles<1>(rows, step, count, panels, first, end, use);
    } else if (deep == 2) {
      by_tiles<2>(rows, step, count, panels, first, end, use);
    } else if (deep == 4) {
      by_tiles<4>(rows, step, count, panels, first, end, use);
    } else {
      by_tiles<0>(rows, step, count, panels, first, end, use);
    }
  }

  // Calls `use` with the row, the column, a multiple of 32, and the scores of every pair, while the next
  // one is multiplied. Tiles of rows stay where they are for inner dimensions of `held` tiles.
  template <int held, typename Use>
  [[gnu::always_inline]] void by_tiles(const F* rows, int64_t step, int64_t count, const F* panels, int64_t first,
                int64_t end, Use&& use) const {
    constexpr int64_t along = kPanel * 2 * sizeof(F), next = along * kDeep / 2;
    const int64_t apart = step * sizeof(F);
    alignas(64) Pair scores[2];
    const int64_t begin = first / 32 * 32;
    int64_t row = 0, column = begin;
    int slot = 0;
    // The compiler does not know what tiles are loaded from.
    asm volatile("" ::: "memory");
    for (int64_t r = 0; r < count; r += 16) {
      const F* left = rows + r * step;
      if constexpr (held >= 1) {
        _tile_loadd(4, left, apart);
      }
      if constexpr (held >= 2) {
        _tile_loadd(5, left + kDeep, apart);
      }
      if constexpr (held >= 4) {
        _tile_loadd(6, left + 2 * kDeep, apart);
        _tile_loadd(7, left + 3 * kDeep, apart);
      }
      for (int64_t c = begin; c < end; c += 32) {
        const char* right = reinterpret_cast<const char*>(columns_at(panels, c));
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (held >= 1) {
          _tile_loadd(2, right, along);
          _tile_dpbf16ps(0, 4, 2);
          _tile_loadd(3, right + 64, along);
          _tile_dpbf16ps(1, 4, 3);
        }
        if constexpr (held >= 2) {
          _tile_loadd(2, right + next, along);
          _tile_dpbf16ps(0, 5, 2);
          _tile_loadd(3, right + next + 64, along);
          _tile_dpbf16ps(1, 5, 3);
        }
        if constexpr (held >= 4) {
          _tile_loadd(2, right + 2 * next, along);
          _tile_dpbf16ps(0, 6, 2);
          _tile_loadd(3, right + 2 * next + 64, along);
          _tile_dpbf16ps(1, 6, 3);
          _tile_loadd(2, right + 3 * next, along);
          _tile_dpbf16ps(0, 7, 2);
          _tile_loadd(3, right + 3 * next + 64, along);
          _tile_dpbf16ps(1, 7, 3);
        }
        if constexpr (held == 0) {
          for (int64_t d = 0; d < dim_; d += kDeep, right += next) {
            _tile_loadd(4, left + d, apart);
            _tile_loadd(2, right, along);
            _tile_dpbf16ps(0, 4, 2);
            _tile_loadd(3, right + 64, along);
            _tile_dpbf16ps(1, 4, 3);
          }
        }
        if (r + c > begin) {
          use(row, column, scores[slot ^ 1]);
        }
        _tile_stored(0, scores[slot][0], 64);
        _tile_stored(1, scores[slot][1], 64);
        row = r, column = c;
        slot ^= 1;
      }
    }
    use(row, column, scores[slot ^ 1]);
  }

  static bool fits(int64_t dim) {
    return std::is_same_v<F, at::BFloat16> && dim % kDeep == 0 && allowed();
  }
#else
  static bool fits(int64_t) { return false; }
#endif

  const int64_t dim_;
  const bool tiles_;
};

}  // namespace longswift
