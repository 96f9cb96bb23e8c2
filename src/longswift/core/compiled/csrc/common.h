// What the kernels share: buffers of a thread, matrix products, packing, reductions.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "dots.h"

namespace longswift {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLowest = -std::numeric_limits<float>::max();
// Exponents of weights that are nothing beside a sum of at least 1; as they are, they would make
// denormal products, which are slow.
constexpr float kNegligible = -60.0f;

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// A distance between rows that hold `n` numbers, one of few: oneDNN compiles and keeps a product for
// every shape and every distance it meets. No power of two, at which rows would share cache lines.
inline int64_t row_step(int64_t n) {
  int64_t step = 512;
  while (step < n) {
    step = step + step / 2 >= n ? step + step / 2 : 2 * step;
  }
  return step + 16;
}

// Signed integers in the order of the numbers they are made of.
inline int32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Memory that a thread keeps: fresh large temporaries cost page faults.
template <typename T>
class Buffer {
 public:
  // At least `count` elements, aligned to a cache line; what was there is lost.
  T* get(int64_t count) {
    if (count > capacity_) {
      const size_t bytes = round_up(count * sizeof(T), 64);
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      TORCH_CHECK(memory_ != nullptr, "expected ", bytes, " bytes of memory, got none");
      capacity_ = count;
    }
    return memory_.get();
  }

  const T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t capacity_ = 0;
};

// What a thread keeps from call to call.
template <typename Space>
Space& of_thread() {
  static thread_local Space mine;
  return mine;
}

// Rows of one head: `row(i)` is contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t step;
  T* row(int64_t i) const { return data + i * step; }
};

template <typename T>
Rows<T> rows_of(const at::Tensor& x, int64_t batch, int64_t head) {
  auto* data = static_cast<T*>(x.data_ptr<std::remove_const_t<T>>());
  return {data + batch * x.stride(0) + head * x.stride(1), x.stride(2)};
}

// Calls `work` with every index below `count`, on torch's own threads; they take the next one when
// they are done, so that the longest should come first.
template <typename Work>
void for_each_index(int64_t count, const Work& work) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      work(i);
    }
    // Some processors keep a tile unit switched on for products.
    at::native::cpublas::brgemm_release();
  });
}

// Calls `work` with every place, `size` numbers each.
template <typename Work>
void for_each_place(at::IntArrayRef places, int64_t size, const Work& work) {
  for_each_index(static_cast<int64_t>(places.size()) / size,
                 [&](int64_t i) { work(places.slice(i * size, size)); });
}

// Whether 16-bit factors in pairs, as the kernels lay them out, can be multiplied here.
inline bool multiplies(at::ScalarType type) {
#if defined(LONGSWIFT_PAIR_DOTS)
  if (type == at::kBFloat16) {
    return true;
  }
#endif
  static const bool bf16 = at::native::cpublas::could_pack(at::kBFloat16);
  static const bool fp16 = at::native::cpublas::could_pack(at::kHalf);
  return type == at::kBFloat16 ? bf16 : type == at::kHalf && fp16;
}

// c [m, n] (+)= a [m, k] @ b, where b is [k, n], and for 16-bit factors [k / 2, n, 2].
template <typename F>
void multiply(int64_t m, int64_t n, int64_t k, const F* a, int64_t lda, const F* b, int64_t ldb,
              float* c, int64_t ldc, bool add = false) {
#if defined(LONGSWIFT_PAIR_DOTS)
  if constexpr (std::is_same_v<F, at::BFloat16>) {
    return dots::product(m, n, k, a, lda, b, ldb, c, ldc, add);
  }
#endif
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, !std::is_same_v<F, float>);
}

// A vector of numbers in another type.
template <typename To>
void convert(To* out, const Vec& in) {
  if constexpr (std::is_same_v<To, float>) {
    in.store(out);
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<To, at::BFloat16>) {
    // ATen does not know the instruction.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(in)));
#endif
  } else {
    float line[kLanes];
    in.store(line);
    at::vec::convert(line, out, kLanes);
  }
}

// The first `n` numbers, at most as many as there are lanes.
template <typename T>
Vec floats_at(const T* x, int64_t n = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(x, n);
#if defined(CPU_CAPABILITY_AVX512)
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto kept = static_cast<__mmask16>((1u << n) - 1);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, x)), 16));
  } else if constexpr (std::is_same_v<T, at::Half>) {
    const auto kept = static_cast<__mmask16>((1u << n) - 1);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kept, x));
#endif
  } else {
    float line[kLanes];
    at::vec::convert(x, line, n);
    return Vec::loadu(line, n);
  }
}

template <typename To, typename From>
void convert(To* out, const From* in, int64_t n) {
  if constexpr (std::is_same_v<To, From>) {
    int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    // To call another function takes longer than to copy a row.
    constexpr int64_t line = 64 / sizeof(To);
    for (; i + line <= n; i += line) {
      _mm512_storeu_si512(out + i, _mm512_loadu_si512(in + i));
    }
#endif
    if (i < n) {
      std::memcpy(out + i, in + i, (n - i) * sizeof(To));
    }
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<To, at::BFloat16> && std::is_same_v<From, float>) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      convert(out + i, Vec::loadu(in + i));
    }
    at::vec::convert(in + i, out + i, n - i);
#endif
#if defined(CPU_CAPABILITY_AVX512)
  } else if constexpr (std::is_same_v<To, float>) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      floats_at(in + i).store(out + i);
    }
    if (i < n) {
      floats_at(in + i, n - i).store(out + i, n - i);
    }
#endif
  } else {
    at::vec::convert(in, out, n);
  }
}

// Fetches a row that will be read soon.
template <typename T>
[[gnu::always_inline]] inline void fetch_row(const T* row, int64_t width) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < width * static_cast<int64_t>(sizeof(T)); b += 64) {
    __builtin_prefetch(bytes + b);
  }
}

template <typename T>
void fetch(const Rows<const T>& x, int64_t first, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    fetch_row(x.row(first + i), width);
  }
}

// `count` rows in the type in which they are multiplied: where they are, or copied to the buffer.
template <typename T, typename F>
const F* factors(const Rows<const T>& x, int64_t first, int64_t count, int64_t width,
                 Buffer<F>& buffer, int64_t* step) {
  if constexpr (std::is_same_v<T, F>) {
    *step = x.step;
    return x.row(first);
  } else {
    F* wide = buffer.get(count * width);
    for (int64_t i = 0; i < count; ++i) {
      convert(wide + i * width, x.row(first + i), width);
    }
    *step = width;
    return wide;
  }
}

// What a query row meets the largest keys of a box with, and what the smallest: a positive channel
// the largest, a negative one the smallest; mixed with the other in proportion, their products add
// up to the bound of a box whose radius is `key_radius` times as long.
template <typename T>
void bound_factors(const T* row, int64_t dim, float scale, float key_radius, float* largest,
                   float* smallest) {
  const float share = (1.0f + key_radius) / 2.0f;
  convert(largest, row, dim);
  for (int64_t d = 0; d < dim; ++d) {
    const float x = largest[d] * scale;
    const float up = std::max(x, 0.0f), down = std::min(x, 0.0f);
    largest[d] = down + share * (up - down);
    smallest[d] = up + share * (down - up);
  }
}

// [rows, k] to `rows` columns of [k, columns] (in pairs along k for 16-bit factors).
template <typename F>
void pack_transposed(const F* in, int64_t step, int64_t rows, int64_t k, F* out, int64_t columns) {
  // A pair of 16-bit numbers moves as one of 32 bits.
  const int64_t units = k * sizeof(F) / sizeof(float), unit_step = step * sizeof(F) / sizeof(float);
  const auto* from = reinterpret_cast<const float*>(in);
  auto* to = reinterpret_cast<float*>(out);
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t tall = std::min<int64_t>(16, rows - r);
    for (int64_t u = 0; u < units; u += 16) {
      at::vec::transpose_mxn<float>(from + r * unit_step + u, unit_step, to + u * columns + r,
                                    columns, static_cast<int>(tall),
                                    static_cast<int>(std::min<int64_t>(16, units - u)));
    }
  }
}

// Zeroes columns [first, end).
template <typename F>
void clear_columns(F* packed, int64_t k, int64_t columns, int64_t first, int64_t end) {
  const int64_t units = k * sizeof(F) / sizeof(float);
  auto* to = reinterpret_cast<float*>(packed);
  for (int64_t u = 0; u < units && first < end; ++u) {
    std::fill(to + u * columns + first, to + u * columns + end, 0.0f);
  }
}

// Calls with values of the inputs' type and of that in which they are multiplied: their own if
// `narrow`, else fp32.
template <typename Call>
void by_types(at::ScalarType type, bool narrow, Call&& call) {
  if (type == at::kFloat) {
    call(float{}, float{});
  } else if (type == at::kBFloat16) {
    narrow ? call(at::BFloat16{}, at::BFloat16{}) : call(at::BFloat16{}, float{});
  } else {
    TORCH_CHECK(type == at::kHalf, "expected fp32, bf16 or fp16, got ", type);
    narrow ? call(at::Half{}, at::Half{}) : call(at::Half{}, float{});
  }
}

// The same, in 16 bits where such factors can be multiplied.
template <typename Call>
void by_own_types(at::ScalarType type, Call&& call) {
  by_types(type, multiplies(type), call);
}

// The same where products only rank: fp32 inputs, too, may be multiplied in 16 bits.
template <typename Call>
void by_ranked_types(at::ScalarType type, bool narrow, Call&& call) {
  if (type == at::kFloat && narrow) {
    call(float{}, at::BFloat16{});
  } else {
    by_types(type, narrow, call);
  }
}

// Unlike torch's maximum this does not look for NaN, which costs thrice as much.
inline Vec larger(const Vec& a, const Vec& b) {
  return at::vec::clamp_min(a, b);
}

using Integers = at::vec::Vectorized<int32_t>;

inline Integers larger(const Integers& a, const Integers& b) {
  return at::vec::maximum(a, b);
}

inline Vec as_floats(const Vec& x) {
  return x;
}

inline Vec as_floats(const Integers& x) {
  return at::vec::convert_to_fp_of_same_size<float>(x);
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
}

inline float max_of(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_max_ps(x);
#else
  return at::vec::vec_reduce_all<float>(
      [](const Vec& a, const Vec& b) { return larger(a, b); }, x);
#endif
}

// One bit for every lane.
inline uint32_t which_above(const Vec& x, const Vec& limits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(x, limits, _CMP_GT_OQ);
#else
  float numbers[kLanes], least[kLanes];
  x.store(numbers);
  limits.store(least);
  uint32_t above = 0;
  for (int64_t i = 0; i < kLanes; ++i) {
    above |= static_cast<uint32_t>(numbers[i] > least[i]) << i;
  }
  return above;
#endif
}

#if defined(CPU_CAPABILITY_AVX512)
// Folds the lanes of each of 16 vectors, `at(i)`: pairs of vectors, of pairs, of quarters; every step
// halves what is left of each.
template <typename At, typename Op>
[[gnu::always_inline]] inline __m512 fold_each(const At& at, const Op& op) {
  __m512 quarters[4];
  for (int q = 0; q < 4; ++q) {
    const __m512 a = at(4 * q), b = at(4 * q + 1), c = at(4 * q + 2), d = at(4 * q + 3);
    const __m512 ab = op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = op(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quarters[q] = op(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const auto halves = [&](const __m512& a, const __m512& b) __attribute__((always_inline)) {
    return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(quarters[0], quarters[1]), halves(quarters[2], quarters[3]));
}
#endif

// The largest lane of each of as many vectors as there are lanes.
template <typename V>
[[gnu::always_inline]] inline V max_of_each(const V* x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, Vec>) {
    return fold_each([&](int i) __attribute__((always_inline)) -> __m512 { return x[i]; },
                     [](const __m512& a, const __m512& b) __attribute__((always_inline)) {
                       return _mm512_max_ps(a, b);
                     });
  } else {
    const __m512 all = fold_each(
        [&](int i) __attribute__((always_inline)) { return _mm512_castsi512_ps(x[i]); },
        [](const __m512& a, const __m512& b) __attribute__((always_inline)) {
          const __m512i first = _mm512_castps_si512(a), second = _mm512_castps_si512(b);
          return _mm512_castsi512_ps(_mm512_max_epi32(first, second));
        });
    return _mm512_castps_si512(all);
  }
#else
  static_assert(std::is_same_v<V, Vec>);
  float largest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    largest[i] = max_of(x[i]);
  }
  return Vec::loadu(largest);
#endif
}

// The sum of the lanes of each of as many vectors as there are lanes.
[[gnu::always_inline]] inline Vec sum_of_each(const Vec* x) {
#if defined(CPU_CAPABILITY_AVX512)
  return fold_each([&](int i) __attribute__((always_inline)) -> __m512 { return x[i]; },
                   [](const __m512& a, const __m512& b) __attribute__((always_inline)) {
                     return _mm512_add_ps(a, b);
                   });
#else
  float sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    sums[i] = sum_of(x[i]);
  }
  return Vec::loadu(sums);
#endif
}

inline float max_over(const float* x, int64_t n) {
  Vec best(kHidden), second(kHidden), third(kHidden), fourth(kHidden);
  int64_t i = 0;
  // One of them would wait for itself.
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    best = larger(best, Vec::loadu(x + i));
    second = larger(second, Vec::loadu(x + i + kLanes));
    third = larger(third, Vec::loadu(x + i + 2 * kLanes));
    fourth = larger(fourth, Vec::loadu(x + i + 3 * kLanes));
  }
  best = larger(larger(best, second), larger(third, fourth));
  for (; i + kLanes <= n; i += kLanes) {
    best = larger(best, Vec::loadu(x + i));
  }
  float top = max_of(best);
  for (; i < n; ++i) {
    top = std::max(top, x[i]);
  }
  return top;
}

constexpr float kLog2e = 1.4426950408889634f;

// 2 ** x for x <= 0, with a relative error of 4e-6: for ranks, where half the work buys more.
inline Vec quick_exp2(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // The smallest normal number instead of slow denormal ones; NaN stays, as the second of two.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 whole = _mm512_roundscale_ps(bounded, 0);
  const __m512 rest = _mm512_sub_ps(bounded, whole);
  __m512 y = _mm512_set1_ps(0.009676037f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.055922035f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24022107f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693121f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0000001f));
  return _mm512_scalef_ps(y, whole);
#else
  return (x * Vec(1.0f / kLog2e)).exp_u20();
#endif
}

// 2 ** x for x <= 0. Of scores of 16-bit factors within 4 %: rounding the factors does as much.
template <bool coarse>
Vec power(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (coarse) {
    // The bits of a float are nearly linear in its logarithm; the chord of a power lies 0.0573 of an
    // octave above it on average.
    constexpr float unit = 1 << 23;
    const __m512 bits =
        _mm512_fmadd_ps(x, _mm512_set1_ps(unit), _mm512_set1_ps((127.0f - 0.0573f) * unit));
    return _mm512_castsi512_ps(_mm512_cvtps_epi32(_mm512_max_ps(bits, _mm512_setzero_ps())));
  }
#endif
  return quick_exp2(x);
}

// 2 ** x for -126 <= x <= 0, with a relative error of 3e-7.
inline Vec exact_exp2(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 whole = _mm512_roundscale_ps(x, 0);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(0.0013276472f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.00967554148f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.0555071327f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.240221197f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693146967f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.00000007f));
  return _mm512_scalef_ps(y, whole);
#else
  return (x * Vec(1.0f / kLog2e)).exp_u20();
#endif
}

// probs = exp(x * scale - top), and their sum before they are rounded; `n` a multiple of the lanes.
// Scores beyond every number leave NaN in both: a sum of 0 is that of a row that saw nothing.
template <typename F>
float exponentials(float* x, int64_t n, float scale, float top, F* probs) {
  constexpr bool whole = std::is_same_v<F, float>;
  Vec total(0.0f);
  // What is rounded to 16 bits may be less exact.
  const Vec by(whole ? scale : scale * kLog2e), shift(whole ? top : top * kLog2e);
  const Vec least(whole ? kNegligible : kNegligible * kLog2e);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec shifted = at::vec::fmsub(Vec::loadu(x + i), by, shift);
    const Vec power = whole ? exact_exp2(shifted * Vec(kLog2e)) : quick_exp2(shifted);
    const Vec e = Vec::blendv(power, Vec(0.0f), shifted <= least);
    total += e;
    convert(probs + i, e);
  }
  return sum_of(total);
}

// [rows, width] as the right factor of a product, `padded` rows of it: as it is, or rows in pairs
// for 16-bit factors; rows that are not there become zero.
template <typename F>
void pack_pairs(const F* in, int64_t step, int64_t rows, int64_t width, F* out, int64_t padded) {
  if constexpr (std::is_same_v<F, float>) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(out + r * width, in + r * step, width * sizeof(F));
    }
    std::fill(out + rows * width, out + padded * width, 0.0f);
  } else {
    const F zero(0.0f);
    for (int64_t r = 0; r < padded; r += 2) {
      const F *even = in + r * step, *odd = even + step;
      F* to = out + r * width;
      int64_t c = 0;
#if defined(CPU_CAPABILITY_AVX512)
      for (; r + 1 < rows && c + 32 <= width; c += 32) {
        const __m512i first = _mm512_loadu_si512(even + c), second = _mm512_loadu_si512(odd + c);
        // Pairs of 128 bits each, to be sorted.
        const __m512i low = _mm512_unpacklo_epi16(first, second);
        const __m512i high = _mm512_unpackhi_epi16(first, second);
        const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        _mm512_storeu_si512(to + 2 * c, _mm512_permutex2var_epi64(low, front, high));
        _mm512_storeu_si512(to + 2 * c + 32, _mm512_permutex2var_epi64(low, back, high));
      }
#endif
      for (; c < width; ++c) {
        to[2 * c] = r < rows ? even[c] : zero;
        to[2 * c + 1] = r + 1 < rows ? odd[c] : zero;
      }
    }
  }
}

}  // namespace longswift
