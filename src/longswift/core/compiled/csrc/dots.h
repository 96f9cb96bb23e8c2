// AVX-512's dot products of four bytes and of two bf16 numbers, where a processor has them and no unit for
// tiles.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__AVX512BF16__) && defined(__linux__)
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

#if defined(LONGSWIFT_BYTE_DOTS) || defined(LONGSWIFT_PAIR_DOTS)

namespace longswift::dots {

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

// Adds to sums of `tall` rows [4 * steps bytes], `apart` bytes apart, and of two times 16 columns, the
// second `second` bytes behind the first, what their products are. Columns lie as right factors of
// tiles do, but `along` bytes apart.
template <typename F, int tall>
[[gnu::always_inline]] inline void add_products(Sums<F> (&sums)[tall][2], const void* rows,
                                                int64_t apart, const void* columns, int64_t along,
                                                int64_t second, int64_t steps) {
  const char* left = static_cast<const char*>(rows);
  const char* right = static_cast<const char*>(columns);
  for (int64_t k = 0; k < steps; ++k, left += 4, right += along) {
    const __m512i one = _mm512_loadu_si512(right), two = _mm512_loadu_si512(right + second);
#pragma GCC unroll 8
    for (int i = 0; i < tall; ++i) {
      int32_t factors;
      std::memcpy(&factors, left + i * apart, sizeof factors);
      const __m512i of_row = _mm512_set1_epi32(factors);
      multiply<F>(sums[i][0], of_row, one);
      multiply<F>(sums[i][1], of_row, two);
    }
  }
}

#if defined(LONGSWIFT_PAIR_DOTS)

// `tall` rows of a product, see `product`.
template <int tall>
void product_of_rows(int64_t n, int64_t k, const at::BFloat16* a, int64_t lda,
                     const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += 32) {
    const int64_t second = n - j > 16 ? 16 : 0;
    Sums<at::BFloat16> sums[tall][2];
#pragma GCC unroll 8
    for (int i = 0; i < tall; ++i) {
      sums[i][0] = add ? _mm512_loadu_ps(c + i * ldc + j) : _mm512_setzero_ps();
      sums[i][1] = add ? _mm512_loadu_ps(c + i * ldc + j + second) : _mm512_setzero_ps();
    }
    add_products<at::BFloat16>(sums, a, 2 * lda, b + 2 * j, 4 * ldb, 4 * second, k / 2);
#pragma GCC unroll 8
    for (int i = 0; i < tall; ++i) {
      _mm512_storeu_ps(c + i * ldc + j + second, sums[i][1]);
      _mm512_storeu_ps(c + i * ldc + j, sums[i][0]);
    }
  }
}

// c [m, n] (+)= a [m, k] @ b [k / 2, n, 2], n a multiple of 16.
inline void product(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda,
                    const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t i = 0;
  const auto rows = [&](auto tall) {
    for (; i + tall <= m; i += tall) {
      product_of_rows<tall>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    }
  };
  rows(std::integral_constant<int, kTall>());
  rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 1>());
}

#endif

}  // namespace longswift::dots

#endif
