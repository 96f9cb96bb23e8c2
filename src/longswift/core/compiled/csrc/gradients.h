// What the gradients of bands and of gathered keys share: some query rows, and products with them.
// Scores are kept by key, [keys, rows], so that only what belongs to few rows or keys is transposed:
// weights and their gradients are left factors as they are.
#pragma once

#include "common.h"

namespace longswift {

// Query rows, and keys, of one product.
constexpr int64_t kSide = 64;

// A multiple of the lanes.
inline void add_rows(float* to, const float* more, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) {
    (Vec::loadu(to + d) + Vec::loadu(more + d)).store(to + d);
  }
}

// `count` rows in fp32, and zeros up to `kSide`; as [width, kSide], too, if that is asked for.
template <typename T>
void load_rows(const Rows<const T>& from, int64_t first, int64_t count, int64_t width, float* to,
               float* columns = nullptr) {
  for (int64_t i = 0; i < count; ++i) {
    convert(to + i * width, from.row(first + i), width);
  }
  std::fill(to + count * width, to + kSide * width, 0.0f);
  if (columns != nullptr) {
    pack_transposed<float>(to, width, kSide, width, columns, kSide);
  }
}

// Rows of one query head, in fp32: so are all products of gradients, whatever the inputs are.
template <typename T>
class QueryRows {
 public:
  QueryRows(int64_t dim, int64_t value_dim, float scale)
      : dim_(dim), value_dim_(value_dim), scale_(scale), mine_(of_thread<Space>()) {}

  // At most `kSide` rows; those that are not there weigh nothing.
  void load(const Rows<const T>& q, const Rows<const T>& d_out, const float* lse,
            const float* delta, int64_t row, int64_t count) {
    load_rows(q, row, count, dim_, mine_.q.get(kSide * dim_), mine_.q_columns.get(kSide * dim_));
    load_rows(d_out, row, count, value_dim_, mine_.d_out.get(kSide * value_dim_),
              mine_.d_out_columns.get(kSide * value_dim_));
    std::fill(mine_.lse, mine_.lse + kSide, std::numeric_limits<float>::infinity());
    std::fill(mine_.delta, mine_.delta + kSide, 0.0f);
    std::copy(lse + row, lse + row + count, mine_.lse);
    std::copy(delta + row, delta + row + count, mine_.delta);
    mine_.d_q.get(dim_ * kSide);
    empty_ = true;
  }

  // A score of no weight.
  float hidden() const { return scale_ < 0.0f ? -kHidden : kHidden; }

  // Of some keys: unscaled scores and, of their values, products with the output's gradient.
  void multiply_keys(int64_t some, const float* keys, float* scores) const {
    multiply<float>(some, kSide, dim_, keys, dim_, mine_.q_columns.data(), kSide, scores, kSide);
  }
  void multiply_values(int64_t some, const float* values, float* products) const {
    multiply<float>(some, kSide, value_dim_, values, value_dim_, mine_.d_out_columns.data(), kSide,
                    products, kSide);
  }

  // Weights of at most `kSide` keys, and gradients of their unscaled scores, go on to where they
  // belong. `columns` are the keys as [dim, kSide]; where `fresh`, theirs are not added but written.
  void add(int64_t some, const float* weights, const float* d_scores, const float* columns,
           float* d_keys, float* d_values, bool fresh = false) {
    multiply<float>(some, value_dim_, kSide, weights, kSide, mine_.d_out.data(), value_dim_,
                    d_values, value_dim_, !fresh);
    multiply<float>(some, dim_, kSide, d_scores, kSide, mine_.q.data(), dim_, d_keys, dim_, !fresh);
    multiply<float>(dim_, kSide, some, columns, kSide, d_scores, kSide, mine_.d_q.get(0), kSide,
                    !empty_);
    empty_ = false;
  }

  // Adds the gradients of the rows that were loaded.
  void store(const Rows<float>& d_q, int64_t row, int64_t count) {
    if (empty_) {
      return;
    }
    float* by_row = mine_.by_row.get(kSide * dim_);
    pack_transposed<float>(mine_.d_q.data(), kSide, dim_, kSide, by_row, dim_);
    for (int64_t i = 0; i < count; ++i) {
      add_rows(d_q.row(row + i), by_row + i * dim_, dim_);
    }
  }

  // Scores of a key to weights, its products to gradients of the scores.
  void differentiate(float* scores, float* products) const {
    const Vec by(scale_), octaves(kLog2e), least(kNegligible);
    for (int64_t i = 0; i < kSide; i += kLanes) {
      const Vec x = at::vec::fmsub(Vec::loadu(scores + i), by, Vec::loadu(mine_.lse + i));
      const Vec weight = Vec::blendv(Vec(0.0f), exact_exp2(x * octaves), x > least);
      weight.store(scores + i);
      ((Vec::loadu(products + i) - Vec::loadu(mine_.delta + i)) * (weight * by)).store(products + i);
    }
  }

  // The same of means of `counts` tokens each, whose sums were multiplied; of the sums, then.
  void differentiate_means(float* scores, float* products, const float* counts) const {
    const Vec by(scale_), octaves(kLog2e), least(kNegligible), one(1.0f), zero(0.0f);
    for (int64_t i = 0; i < kSide; i += kLanes) {
      const Vec count = Vec::loadu(counts + i), share = one / larger(count, one);
      const Vec x = at::vec::fmsub(Vec::loadu(scores + i) * share, by, Vec::loadu(mine_.lse + i));
      // The logarithm of the count is what a weight for one token lacks.
      const Vec some = Vec::blendv(zero, exact_exp2(x * octaves), x > least);
      const Vec weight = Vec::blendv(zero, some, count > zero);
      weight.store(scores + i);
      (at::vec::fmsub(Vec::loadu(products + i), share, Vec::loadu(mine_.delta + i)) * (weight * by))
          .store(products + i);
    }
  }

 private:
  struct Space {
    Buffer<float> q, q_columns, d_out, d_out_columns, d_q, by_row;
    float lse[kSide], delta[kSide];
  };

  const int64_t dim_, value_dim_;
  const float scale_;
  Space& mine_;
  bool empty_ = true;
};

}  // namespace longswift
