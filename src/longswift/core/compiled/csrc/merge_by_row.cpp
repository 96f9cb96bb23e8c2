// Gathered tokens, each for some rows of a block, and the remainder as each row sees it, merged into
// what the bands saw; see `gathered_gradients.cpp`.
#include "gathered_keys.h"

namespace longswift {

namespace {

struct Space {
  Buffer<float> queries, query_columns, value_columns, scores, counts, sums, by_row;
};

// One KV head and the query heads of its group.
template <typename T>
class Merger {
 public:
  Merger(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Outside& outside,
         at::Tensor& out, at::Tensor& lse, int64_t batch, int64_t head, float scale)
      : q_(q),
        out_(out),
        lse_(lse),
        batch_(batch),
        head_(head),
        groups_(q.size(1) / k.size(1)),
        dim_(q.size(3)),
        value_dim_(v.size(3)),
        scale_(scale),
        loaded_(k, v, outside, q.size(2), batch, head),
        mine_(of_thread<Space>()) {}

  void run(int64_t block) {
    width_ = loaded_.load(block);
    if (width_ == 0) {
      return;
    }
    float* columns = mine_.value_columns.get(round_up(width_, kSide) * value_dim_);
    for (int64_t i = 0; i < width_; i += kSide) {
      pack_transposed<float>(loaded_.values() + i * value_dim_, value_dim_,
                             std::min(kSide, width_ - i), value_dim_, columns + i * value_dim_,
                             kSide);
    }
    const auto [first, end] = loaded_.rows(block);
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t row = first; row < end; row += kSide) {
        attend(head_ * groups_ + g, row, std::min(kSide, end - row));
      }
    }
  }

 private:
  void attend(int64_t head, int64_t row, int64_t count) {
    float* queries = mine_.query_columns.get(kSide * dim_);
    load_rows(rows_of<const T>(q_, batch_, head), row, count, dim_,
              mine_.queries.get(kSide * dim_), queries);
    float* scores = mine_.scores.get(width_ * kSide);
    for (int64_t i = 0; i < width_; i += kSide) {
      multiply<float>(std::min(kSide, width_ - i), kSide, dim_, loaded_.keys() + i * dim_, dim_,
                      queries, kSide, scores + i * kSide, kSide);
    }
    float tops[kSide], totals[kSide];
    raise(row, scores, tops);
    weigh(row, scores, tops, totals);
    float* sums = mine_.sums.get(value_dim_ * kSide);
    for (int64_t i = 0; i < width_; i += kSide) {
      multiply<float>(value_dim_, kSide, std::min(kSide, width_ - i),
                      mine_.value_columns.data() + i * value_dim_, kSide, scores + i * kSide, kSide,
                      sums, kSide, i > 0);
    }
    float* by_row = mine_.by_row.get(kSide * value_dim_);
    pack_transposed<float>(sums, kSide, value_dim_, kSide, by_row, value_dim_);
    merge(head, row, count, by_row, tops, totals);
  }

  // Scales the scores, those of columns to means without the tokens that a row sees apart, and finds
  // the largest of each row, 0 where it sees nothing.
  void raise(int64_t row, float* scores, float* tops) {
    const int64_t tokens = loaded_.tokens(), columns = loaded_.pools().count;
    float* counts = mine_.counts.get(columns * kSide);
    loaded_.count(row, counts);
    const Vec by(scale_), one(1.0f), zero(0.0f), hidden(kHidden);
    std::fill(tops, tops + kSide, kHidden);
    for (int64_t t = 0; t < tokens; ++t) {
      const auto [first, end] = loaded_.seen(t, row);
      if (columns > 0) {
        loaded_.take_from_column(t, SeenBy(first, end), scores);
      }
      float* score = scores + t * kSide;
      for (int64_t i = 0; i < kSide; i += kLanes) {
        (Vec::loadu(score + i) * by).store(score + i);
      }
      std::fill(score, score + first, kHidden);
      std::fill(score + std::max(first, end), score + kSide, kHidden);
      for (int64_t i = 0; i < kSide; i += kLanes) {
        larger(Vec::loadu(tops + i), Vec::loadu(score + i)).store(tops + i);
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      float* score = scores + (tokens + c) * kSide;
      for (int64_t i = 0; i < kSide; i += kLanes) {
        const Vec count = Vec::loadu(counts + c * kSide + i);
        const Vec mean = Vec::loadu(score + i) / larger(count, one) * by;
        const Vec x = Vec::blendv(hidden, mean, count > zero);
        x.store(score + i);
        larger(Vec::loadu(tops + i), x).store(tops + i);
      }
    }
    for (int64_t i = 0; i < kSide; ++i) {
      tops[i] = tops[i] == kHidden ? 0.0f : tops[i];
    }
    // What else there is weighs nothing.
    std::fill(scores + (tokens + columns) * kSide, scores + width_ * kSide, 0.0f);
  }

  // Coefficients of tokens and of the columns' sums, and the sums of weights.
  void weigh(int64_t row, float* scores, const float* tops, float* totals) const {
    const int64_t tokens = loaded_.tokens(), columns = loaded_.pools().count;
    const float* counts = mine_.counts.data();
    std::fill(totals, totals + kSide, 0.0f);
    // Of a column a weight for each of its tokens.
    for (int64_t c = 0; c < columns; ++c) {
      exponentials_of(scores + (tokens + c) * kSide, tops, totals, counts + c * kSide);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      exponentials_of(scores + t * kSide, tops, totals, nullptr);
      if (columns > 0) {
        const auto [first, end] = loaded_.seen(t, row);
        loaded_.take_from_token(t, SeenBy(first, end), scores);
      }
    }
  }

  static void exponentials_of(float* scores, const float* tops, float* totals,
                              const float* counts) {
    const Vec octaves(kLog2e), least(kNegligible), zero(0.0f);
    for (int64_t i = 0; i < kSide; i += kLanes) {
      const Vec x = Vec::loadu(scores + i) - Vec::loadu(tops + i);
      const Vec weight = Vec::blendv(zero, exact_exp2(x * octaves), x > least);
      weight.store(scores + i);
      const Vec total = Vec::loadu(totals + i);
      (counts == nullptr ? total + weight
                         : at::vec::fmadd(weight, Vec::loadu(counts + i), total)).store(totals + i);
    }
  }

  // Adds what `count` rows saw, `sums` of values by weights that add up to `totals` relative to
  // `tops`, to what their bands saw.
  void merge(int64_t head, int64_t row, int64_t count, const float* sums, const float* tops,
             const float* totals) {
    const Rows<T> out = rows_of<T>(out_, batch_, head);
    float* lse = lse_.data_ptr<float>() + batch_ * lse_.stride(0) + head * lse_.stride(1) + row;
    for (int64_t i = 0; i < count; ++i) {
      if (totals[i] == 0.0f) {
        continue;
      }
      const float mine = tops[i] + std::log(totals[i]), high = std::max(mine, lse[i]);
      const float total = high + std::log(std::exp(mine - high) + std::exp(lse[i] - high));
      const Vec keep(share(lse[i] - total)), add(share(mine - total) / totals[i]);
      lse[i] = total;
      T* to = out.row(row + i);
      const float* more = sums + i * value_dim_;
      for (int64_t d = 0; d < value_dim_; d += kLanes) {
        convert(to + d, at::vec::fmadd(floats_at(to + d), keep, Vec::loadu(more + d) * add));
      }
    }
  }

  static float share(float x) { return x > kNegligible ? std::exp(x) : 0.0f; }

  const at::Tensor &q_, &out_, &lse_;
  const int64_t batch_, head_, groups_, dim_, value_dim_;
  const float scale_;
  GatheredKeys<T> loaded_;
  Space& mine_;
  int64_t width_ = 0;
};

}  // namespace

void merge_by_row(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const Outside& outside, at::Tensor out, at::Tensor lse, at::IntArrayRef places,
                  double scale) {
  by_types(q.scalar_type(), false, [&](auto in, auto) {
    for_each_place(places, 4, [&](at::IntArrayRef at) {
      Merger<decltype(in)> merger(q, k, v, outside, out, lse, at[0], at[1],
                                  static_cast<float>(scale));
      for (int64_t n = at[2]; n < at[2] + at[3]; ++n) {
        merger.run(n);
      }
    });
  });
}

}  // namespace longswift
