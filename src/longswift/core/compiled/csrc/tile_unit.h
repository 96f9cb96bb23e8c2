// Products of bf16 factors and of bytes: by the processor's unit for tiles, or by AVX-512's dot products,
// where it has one of them.
#pragma once

#include "common.h"

#if defined(LONGSWIFT_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longswift {

// Inner dimension of a tile of bf16 factors, and of one of other factors.
constexpr int64_t kDeep = 32;
template <typename F>
constexpr int64_t kDeepOf = 64 / sizeof(F);

// Whether such products of factors are compiled.
template <typename F>
constexpr bool kUnitOf =
#if defined(LONGSWIFT_TILES)
    std::is_same_v<F, int8_t> || std::is_same_v<F, at::BFloat16>;
#else
#if defined(LONGSWIFT_BYTE_DOTS)
    std::is_same_v<F, int8_t> ||
#endif
#if defined(LONGSWIFT_PAIR_DOTS)
    std::is_same_v<F, at::BFloat16> ||
#endif
    false;
#endif

#if defined(LONGSWIFT_TILES) || defined(LONGSWIFT_PAIR_DOTS)
#define LONGSWIFT_PAIRS 1
#endif

// What left factors of bytes are larger by: dot products take them without a sign.
#if defined(LONGSWIFT_BYTE_DOTS)
constexpr int32_t kByteOffset = 128;
#else
constexpr int32_t kByteOffset = 0;
#endif

// Eight tiles of 16 rows of 64 bytes. While an object that uses them lives, its thread must not
// multiply by other means.
class TileUnit {
 public:
  explicit TileUnit(bool used) : used_(used) {
#if defined(LONGSWIFT_TILES)
    if (used_) {
      // Ends the configuration that other products left.
      at::native::cpublas::brgemm_release();
      alignas(64) static constexpr Configuration whole;
      _tile_loadconfig(&whole);
    }
#endif
  }

  ~TileUnit() {
#if defined(LONGSWIFT_TILES)
    if (used_) {
      _tile_release();
    }
#endif
  }

  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

  // Whether this process may multiply such factors so.
  template <typename F>
  static bool there() {
    return kUnitOf<F> && allowed();
  }

  bool used() const { return used_; }

 private:
  static bool allowed() {
#if defined(LONGSWIFT_TILES)
    // Linux lets a process use tiles when it asks.
    constexpr int64_t ask = 0x1023, tile_data = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ask, tile_data) == 0;
    return allowed;
#else
    return true;
#endif
  }

  struct Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  const bool used_;
};

#if defined(LONGSWIFT_TILES)

// The instructions, for numbers of tiles that a template computes; the compiler's own want digits.
namespace tile {

template <int to>
void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(to));
}

// 16 rows of 64 bytes, `apart` bytes apart. The compiler does not know that memory is read.
template <int to>
void load(const void* rows, int64_t apart) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(apart), "i"(to));
}

template <int from>
void store(void* rows, int64_t apart) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(apart), "i"(from) : "memory");
}

// Adds the product of tiles of bf16 factors, the right one's rows in pairs, or of bytes, in fours.
template <int sum, int left, int right, typename F = at::BFloat16>
void multiply() {
  if constexpr (std::is_same_v<F, int8_t>) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
  }
}

}  // namespace tile

#endif

}  // namespace longswift
