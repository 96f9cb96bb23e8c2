// Gradients of what blocks of queries see outside their bands. With scores `s` of the tokens a row sees
// apart, a column of `c` other tokens has the score `(q.K - sum of s) / c + log c` and the value
// `(V - sum of values) / c`, where `K` and `V` are sums of the whole pool, the same for all rows.
#include "gathered_keys.h"

namespace longswift {

namespace {

// Parts of the keys, each of which one thread adds up.
constexpr int64_t kParts = 4;

struct Space {
  Buffer<float> columns, scores, products, counts;
};

// What a block of queries adds to the rows it has loaded: gradients of keys, then of values.
struct Share {
  float *keys, *values;
};

template <typename T>
class Block {
 public:
  Block(const Differentiated& of, const Outside& outside, int64_t batch, int64_t head)
      : of_(of),
        batch_(batch),
        head_(head),
        groups_(of.q.size(1) / of.k.size(1)),
        dim_(of.q.size(3)),
        value_dim_(of.v.size(3)),
        loaded_(of.k, of.v, outside, of.q.size(2), batch, head),
        rows_(dim_, value_dim_, of.scale),
        mine_(of_thread<Space>()) {}

  // Whether there is any.
  bool run(int64_t block, const Share& share) {
    width_ = loaded_.load(block);
    if (width_ == 0) {
      return false;
    }
    float* columns = mine_.columns.get(round_up(width_, kSide) * dim_);
    for (int64_t i = 0; i < width_; i += kSide) {
      pack_transposed<float>(loaded_.keys() + i * dim_, dim_, std::min(kSide, width_ - i), dim_,
                             columns + i * dim_, kSide);
    }
    const auto [first, end] = loaded_.rows(block);
    bool fresh = true;
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t row = first; row < end; row += kSide) {
        attend(head_ * groups_ + g, row, std::min(kSide, end - row), share, fresh);
        fresh = false;
      }
    }
    return true;
  }

 private:
  void attend(int64_t head, int64_t row, int64_t count, const Share& share, bool fresh) {
    const int64_t place = (batch_ * of_.q.size(1) + head) * of_.q.size(2);
    rows_.load(rows_of<const T>(of_.q, batch_, head), rows_of<const T>(of_.d_out, batch_, head),
               of_.lse.data_ptr<float>() + place, of_.delta.data_ptr<float>() + place, row, count);
    float* scores = mine_.scores.get(width_ * kSide);
    float* products = mine_.products.get(width_ * kSide);
    for (int64_t i = 0; i < width_; i += kSide) {
      const int64_t some = std::min(kSide, width_ - i);
      rows_.multiply_keys(some, loaded_.keys() + i * dim_, scores + i * kSide);
      rows_.multiply_values(some, loaded_.values() + i * value_dim_, products + i * kSide);
    }
    if (loaded_.pools().count > 0) {
      differentiate_columns(row, scores, products);
    }
    differentiate_tokens(row, scores, products);
    for (int64_t i = 0; i < width_; i += kSide) {
      rows_.add(std::min(kSide, width_ - i), scores + i * kSide, products + i * kSide,
                mine_.columns.data() + i * dim_, share.keys + i * dim_,
                share.values + i * value_dim_, fresh);
    }
    rows_.store(rows_of<float>(of_.d_q, batch_, head), row, count);
  }

  // Coefficients of the columns' sums, without the tokens that a row sees apart.
  void differentiate_columns(int64_t row, float* scores, float* products) {
    const int64_t columns = loaded_.pools().count;
    float* counts = mine_.counts.get(columns * kSide);
    loaded_.count(row, counts);
    for (int64_t t = 0; t < loaded_.tokens(); ++t) {
      const auto [first, end] = loaded_.seen(t, row);
      const SeenBy seen(first, end);
      loaded_.take_from_column(t, seen, scores);
      loaded_.take_from_column(t, seen, products);
    }
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = (loaded_.tokens() + c) * kSide;
      rows_.differentiate_means(scores + at, products + at, counts + c * kSide);
    }
  }

  // Coefficients of the tokens, without what they get through the sums of their columns.
  void differentiate_tokens(int64_t row, float* scores, float* products) const {
    const bool pooled = loaded_.pools().count > 0;
    for (int64_t t = 0; t < loaded_.tokens(); ++t) {
      float* score = scores + t * kSide;
      const auto [first, end] = loaded_.seen(t, row);
      std::fill(score, score + first, rows_.hidden());
      std::fill(score + std::max(first, end), score + kSide, rows_.hidden());
      rows_.differentiate(score, products + t * kSide);
      if (pooled) {
        const SeenBy seen(first, end);
        loaded_.take_from_token(t, seen, scores);
        loaded_.take_from_token(t, seen, products);
      }
    }
  }

  const Differentiated& of_;
  const int64_t batch_, head_, groups_, dim_, value_dim_;
  GatheredKeys<T> loaded_;
  QueryRows<T> rows_;
  Space& mine_;
  int64_t width_ = 0;
};

// Adds the shares of some blocks of a KV head to part of its keys and pools, block after block.
template <typename T>
class Sums {
 public:
  Sums(const Differentiated& of, const Outside& outside, const PoolGradients& pools, int64_t batch,
       int64_t head, int64_t part)
      : outside_(outside),
        loaded_(of.k, of.v, outside, of.q.size(2), batch, head),
        dim_(of.k.size(3)),
        value_dim_(of.v.size(3)),
        first_(part * of.k.size(2) / kParts),
        end_((part + 1) * of.k.size(2) / kParts),
        tokens_{rows_of<float>(of.d_k, batch, head), rows_of<float>(of.d_v, batch, head)} {
    if (outside.pool > 0) {
      whole_ = {rows_of<float>(pools.d_k_sum, batch, head),
                rows_of<float>(pools.d_v_sum, batch, head)};
      grains_ = {rows_of<float>(pools.d_k_grain, batch, head),
                 rows_of<float>(pools.d_v_grain, batch, head)};
    }
  }

  void add(int64_t block, const Share& share) const {
    const int64_t tokens =
        loaded_.for_each_token(block, [&](int64_t token, int64_t, int64_t t) {
          add(tokens_, token, token, share, t);
        });
    const PoolColumns columns = loaded_.columns(block);
    for (int64_t c = 0; c < columns.count; ++c) {
      const int64_t pool = columns.pool(c);
      if (pool >= 0) {
        add(whole_, pool, pool * columns.size, share, tokens + c);
        continue;
      }
      columns.for_each_grain(c, outside_.grain, [&](int64_t g) {
        add(grains_, g, g * outside_.grain, share, tokens + c);
      });
    }
  }

 private:
  struct Pair {
    Rows<float> keys{}, values{};
  };

  // Adds a row of the share to row `at` of what begins at token `place`, if that is in this part.
  void add(const Pair& to, int64_t at, int64_t place, const Share& share, int64_t row) const {
    if (place >= first_ && place < end_) {
      add_rows(to.keys.row(at), share.keys + row * dim_, dim_);
      add_rows(to.values.row(at), share.values + row * value_dim_, value_dim_);
    }
  }

  const Outside& outside_;
  const GatheredKeys<T> loaded_;
  const int64_t dim_, value_dim_, first_, end_;
  const Pair tokens_;
  Pair whole_, grains_;
};

}  // namespace

void add_gathered_gradients(const Differentiated& of, const Outside& outside,
                            const PoolGradients& pools, at::Tensor shares,
                            at::IntArrayRef places) {
  const int64_t heads = static_cast<int64_t>(places.size()) / 4, most = shares.size(0) / heads;
  float* memory = shares.data_ptr<float>();
  const auto share = [&](int64_t i) {
    float* keys = memory + i * shares.stride(0);
    return Share{keys, keys + shares.size(1) * of.k.size(3)};
  };
  std::vector<char> found(heads * most);
  by_types(of.q.scalar_type(), false, [&](auto in, auto) {
    using T = decltype(in);
    for_each_index(heads * most, [&](int64_t i) {
      const auto at = places.slice(i / most * 4, 4);
      if (i % most < at[3]) {
        found[i] = Block<T>(of, outside, at[0], at[1]).run(at[2] + i % most, share(i));
      }
    });
    for_each_index(heads * kParts, [&](int64_t i) {
      const auto at = places.slice(i / kParts * 4, 4);
      const Sums<T> sums(of, outside, pools, at[0], at[1], i % kParts);
      for (int64_t n = 0; n < at[3]; ++n) {
        const int64_t place = i / kParts * most + n;
        if (found[place]) {
          sums.add(at[2] + n, share(place));
        }
      }
    });
  });
}

}  // namespace longswift
