// Products of keys with packed columns, in the processor's tile unit where it has one for bf16.
#pragma once

#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LONGSWIFT_TILES 1
#endif

namespace longswift {

// Inner dimensions as short as a head's leave a general product busy with loading and storing; here
// four tiles of results share what is loaded. While an object lives, its thread must not multiply
// by other means.
template <typename F>
class TileProducts {
 public:
  explicit TileProducts(int64_t dim) : dim_(dim), tiles_(fits(dim)) {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      // Ends the configuration that other products left.
      at::native::cpublas::brgemm_release();
      alignas(64) static constexpr Configuration whole;
      _tile_loadconfig(&whole);
    }
#endif
  }

  ~TileProducts() {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      _tile_release();
    }
#endif
  }

  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;

  // scores [keys, columns] = keys [keys, dim] @ packed [dim, columns]; `keys` a multiple of 32,
  // `columns` of 16.
  void multiply(const F* keys, int64_t step, int64_t count, const F* packed, int64_t columns,
                float* scores) const {
#if defined(LONGSWIFT_TILES)
    if (tiles_) {
      for (int64_t r = 0; r < count; r += 32) {
        int64_t c = 0;
        for (; c + 32 <= columns; c += 32) {
          square(keys + r * step, step, packed + 2 * c, columns, scores + r * columns + c);
        }
        if (c < columns) {
          narrow(keys + r * step, step, packed + 2 * c, columns, scores + r * columns + c);
        }
      }
      return;
    }
#endif
    longswift::multiply<F>(count, columns, dim_, keys, step, packed, columns, scores, columns);
  }

 private:
#if defined(LONGSWIFT_TILES)
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

  // 32 keys with 32 columns.
  void square(const F* keys, int64_t step, const F* packed, int64_t columns, float* scores) const {
    const int64_t a = step * 2, b = columns * 4, c = columns * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim_; d += 32) {
      _tile_loadd(4, keys + d, a);
      _tile_loadd(6, packed + d * columns, b);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys + 16 * step + d, a);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, packed + d * columns + 32, b);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores, c);
    _tile_stored(1, scores + 16, c);
    _tile_stored(2, scores + 16 * columns, c);
    _tile_stored(3, scores + 16 * columns + 16, c);
  }

  // 32 keys with 16 columns.
  void narrow(const F* keys, int64_t step, const F* packed, int64_t columns, float* scores) const {
    const int64_t a = step * 2, b = columns * 4, c = columns * 4;
    _tile_zero(0);
    _tile_zero(2);
    for (int64_t d = 0; d < dim_; d += 32) {
      _tile_loadd(4, keys + d, a);
      _tile_loadd(6, packed + d * columns, b);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys + 16 * step + d, a);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, scores, c);
    _tile_stored(2, scores + 16 * columns, c);
  }

  static bool fits(int64_t dim) {
    return std::is_same_v<F, at::BFloat16> && dim % 32 == 0 && allowed();
  }
#else
  static bool fits(int64_t) { return false; }
#endif

  const int64_t dim_;
  const bool tiles_;
};

}  // namespace longswift
