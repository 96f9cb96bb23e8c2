// What a block of queries sees outside its band where rows may differ: gathered tokens, each for some
// of the rows, and sums of pools, from which a row takes the tokens back that it sees apart.
#pragma once

#include <array>

#include "gradients.h"
#include "kernels.h"
#include "pool_columns.h"

namespace longswift {

// Keys are loaded in steps of so many.
constexpr int64_t kFew = 16;

// 1 for the rows [first, end) of `kSide`, else 0.
class SeenBy {
 public:
  SeenBy(int64_t first, int64_t end)
      : since_(kSteps.data() + kSide - first), before_(kSteps.data() + 2 * kSide - end) {}
  Vec at(int64_t i) const { return Vec::loadu(since_ + i) * Vec::loadu(before_ + i); }

 private:
  // Zeros, ones, zeros.
  static constexpr auto kSteps = [] {
    std::array<float, 3 * kSide> steps{};
    for (int64_t i = kSide; i < 2 * kSide; ++i) {
      steps[i] = 1.0f;
    }
    return steps;
  }();
  const float *since_, *before_;
};

// One KV head.
template <typename T>
class GatheredKeys {
 public:
  GatheredKeys(const at::Tensor& k, const at::Tensor& v, const Outside& of, int64_t queries,
               int64_t batch, int64_t head)
      : of_(of),
        dim_(k.size(3)),
        value_dim_(v.size(3)),
        q_len_(queries),
        k_len_(k.size(2)),
        slots_(of.tokens.size(3)),
        k_(rows_of<const T>(k, batch, head)),
        v_(rows_of<const T>(v, batch, head)),
        edges_(of.edges.data_ptr<int64_t>() + head * of.edges.stride(0)),
        tokens_(slots_of(of.tokens, batch, head)),
        from_(slots_of(of.from, batch, head)),
        until_(slots_of(of.until, batch, head)),
        mine_(of_thread<Space>()) {
    if (of.pool > 0) {
      key_grains_ = rows_of<const float>(of.k_grain, batch, head);
      value_grains_ = rows_of<const float>(of.v_grain, batch, head);
      key_sums_ = rows_of<const float>(of.k_sum, batch, head);
      value_sums_ = rows_of<const float>(of.v_sum, batch, head);
    }
  }

  // First and one past the last query row of a block.
  std::pair<int64_t, int64_t> rows(int64_t block) const {
    const int64_t offset = k_len_ - q_len_, at = offset / of_.block + block;
    return {std::max(offset, at * of_.block) - offset,
            std::min(k_len_, (at + 1) * of_.block) - offset};
  }

  PoolColumns columns(int64_t block) const {
    if (of_.pool == 0) {
      return {};
    }
    return {of_.pool, edges_[2 * block], edges_[2 * block + 1], k_len_, of_.k_sum.size(2),
            of_.causal};
  }

  // Calls with every token that a block has gathered, its slot, and how many came before it.
  template <typename Call>
  int64_t for_each_token(int64_t block, const Call& call) const {
    const int32_t* slots = tokens_ + block * slots_;
    int64_t count = 0;
    for (int64_t c = 0; c < slots_; ++c) {
      if (slots[c] >= 0) {
        call(slots[c], c, count++);
      }
    }
    return count;
  }

  // Loads the tokens, then the sums of the columns; returns how many rows there are, a multiple of
  // `kFew`, or 0.
  int64_t load(int64_t block) {
    pools_ = columns(block);
    int64_t* column_of = mine_.column_of.get(slots_);
    int64_t *from = mine_.from.get(slots_), *until = mine_.until.get(slots_);
    const int64_t most = round_up(slots_ + pools_.count, kFew);
    float *keys = mine_.keys.get(most * dim_), *values = mine_.values.get(most * value_dim_);
    count_ = for_each_token(block, [&](int64_t token, int64_t slot, int64_t t) {
      const int64_t at = block * slots_ + slot;
      from[t] = from_ == nullptr ? 0 : from_[at];
      until[t] = until_ == nullptr ? k_len_ : until_[at];
      column_of[t] = of_.pool > 0 ? pools_.of_token(token) : 0;
      convert(keys + t * dim_, k_.row(token), dim_);
      convert(values + t * value_dim_, v_.row(token), value_dim_);
    });
    if (count_ == 0 && pools_.start == 0 && pools_.right_end == pools_.end && pools_.count == 2) {
      return 0;
    }
    float* totals = mine_.totals.get(pools_.count);
    for (int64_t c = 0; c < pools_.count; ++c) {
      load_column(c, keys + (count_ + c) * dim_, values + (count_ + c) * value_dim_, totals + c);
    }
    const int64_t used = count_ + pools_.count, width = round_up(used, kFew);
    std::fill(keys + used * dim_, keys + width * dim_, 0.0f);
    std::fill(values + used * value_dim_, values + width * value_dim_, 0.0f);
    return width;
  }

  // Of what is loaded: rows of keys and of values, tokens first.
  const float* keys() const { return mine_.keys.data(); }
  const float* values() const { return mine_.values.data(); }
  int64_t tokens() const { return count_; }
  const PoolColumns& pools() const { return pools_; }

  // Of `x`, a line of `kSide` query rows for every row that is loaded: what a token has is taken from
  // its column, or what its column has from the token, where the token is seen.
  void take_from_column(int64_t t, const SeenBy& seen, float* x) const {
    subtract(x + (count_ + mine_.column_of.data()[t]) * kSide, x + t * kSide, seen);
  }
  void take_from_token(int64_t t, const SeenBy& seen, float* x) const {
    subtract(x + t * kSide, x + (count_ + mine_.column_of.data()[t]) * kSide, seen);
  }

  // Tokens of each column that the rows from `row` on do not see apart, a line for every column.
  void count(int64_t row, float* counts) const {
    for (int64_t c = 0; c < pools_.count; ++c) {
      std::fill_n(counts + c * kSide, kSide, mine_.totals.data()[c]);
    }
    for (int64_t t = 0; t < count_ && pools_.count > 0; ++t) {
      const auto [first, end] = seen(t, row);
      float* line = counts + mine_.column_of.data()[t] * kSide;
      const SeenBy by(first, end);
      for (int64_t i = 0; i < kSide; i += kLanes) {
        (Vec::loadu(line + i) - by.at(i)).store(line + i);
      }
    }
  }

  // Which of the rows from `row` on see a token: [first, end).
  std::pair<int64_t, int64_t> seen(int64_t t, int64_t row) const {
    const int64_t position = row + k_len_ - q_len_;
    return {std::clamp<int64_t>(mine_.from.data()[t] - position, 0, kSide),
            std::clamp<int64_t>(mine_.until.data()[t] - position, 0, kSide)};
  }

 private:
  struct Space {
    Buffer<float> keys, values, totals;
    Buffer<int64_t> column_of, from, until;
  };

  static void subtract(float* from, const float* what, const SeenBy& seen) {
    for (int64_t i = 0; i < kSide; i += kLanes) {
      at::vec::fnmadd(seen.at(i), Vec::loadu(what + i), Vec::loadu(from + i)).store(from + i);
    }
  }

  static const int32_t* slots_of(const at::Tensor& x, int64_t batch, int64_t head) {
    if (x.numel() == 0) {
      return nullptr;
    }
    return x.data_ptr<int32_t>() + (x.size(0) > 1 ? batch : 0) * x.stride(0) + head * x.stride(1);
  }

  void load_column(int64_t column, float* key, float* value, float* total) const {
    const int64_t pool = pools_.pool(column);
    if (pool >= 0) {
      convert(key, key_sums_.row(pool), dim_);
      convert(value, value_sums_.row(pool), value_dim_);
      *total = static_cast<float>(std::min(of_.pool, k_len_ - pool * of_.pool));
      return;
    }
    std::fill(key, key + dim_, 0.0f);
    std::fill(value, value + value_dim_, 0.0f);
    pools_.for_each_grain(column, of_.grain, [&](int64_t g) {
      add_rows(key, key_grains_.row(g), dim_);
      add_rows(value, value_grains_.row(g), value_dim_);
    });
    *total = static_cast<float>(pools_.cut(column));
  }

  const Outside& of_;
  const int64_t dim_, value_dim_, q_len_, k_len_, slots_;
  const Rows<const T> k_, v_;
  const int64_t* edges_;
  const int32_t *tokens_, *from_, *until_;
  Space& mine_;
  int64_t count_ = 0;
  PoolColumns pools_;
  Rows<const float> key_grains_{}, value_grains_{}, key_sums_{}, value_sums_{};
};

}  // namespace longswift
