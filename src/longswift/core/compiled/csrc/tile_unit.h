// Products of bf16 factors and of bytes: by the processor's unit for tiles, or by AVX-512's dot products,
// where it has one of them.
#pragma once

#include "common.h"

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define LONGSWIFT_TILES 1
#else
#if defined(__AVX512VNNI__)
#define LONGSWIFT_BYTE_DOTS 1
#endif
#if defined(__AVX512BF16__)
#define LONGSWIFT_PAIR_DOTS 1
#endif
#endif
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

#elif defined(LONGSWIFT_BYTE_DOTS) || defined(LONGSWIFT_PAIR_DOTS)

namespace dots {

// Rows whose sums are in registers at once, two vectors each.
constexpr int kTall = 8;

// A vector of sums; in a class, as attributes of types get lost where these are arguments of templates.
template <typename F>
struct SumsOf {
  using Type = __m512;
};
template <>
struct SumsOf<int8_t> {
  using Type = __m512i;
};
template <typename F>
using Sums = typename SumsOf<F>::Type;

// Adds to every lane four products of bytes, the left ones without a sign, or two of bf16.
template <typename F>
[[gnu::always_inline]] inline void multiply(Sums<F>& sum, __m512i left, __m512i right) {
#if defined(LONGSWIFT_BYTE_DOTS)
  if constexpr (std::is_same_v<F, int8_t>) {
    sum = _mm512_dpbusd_epi32(sum, left, right);
  }
#endif
#if defined(LONGSWIFT_PAIR_DOTS)
  if constexpr (std::is_same_v<F, at::BFloat16>) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
#endif
}

// Adds to sums of `kTall` rows [4 * steps bytes], `apart` bytes apart, and of two times 16 columns, the
// second `second` bytes behind the first, what their products are. Columns lie as right factors of
// tiles do, but `along` bytes apart.
template <typename F>
[[gnu::always_inline]] inline void add_products(Sums<F> (&sums)[kTall][2], const void* rows,
                                                int64_t apart, const void* columns, int64_t along,
                                                int64_t second, int64_t steps) {
  const char* left = static_cast<const char*>(rows);
  const char* right = static_cast<const char*>(columns);
  for (int64_t k = 0; k < steps; ++k, left += 4, right += along) {
    const __m512i one = _mm512_loadu_si512(right), two = _mm512_loadu_si512(right + second);
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) {
      int32_t factors;
      std::memcpy(&factors, left + i * apart, sizeof factors);
      const __m512i of_row = _mm512_set1_epi32(factors);
      multiply<F>(sums[i][0], of_row, one);
      multiply<F>(sums[i][1], of_row, two);
    }
  }
}

}  // namespace dots

#endif

}  // namespace longswift
