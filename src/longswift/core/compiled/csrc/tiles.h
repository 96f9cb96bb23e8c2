// Tiles of queries against a contiguous stretch of keys, which are packed once for many rows.
#pragma once

#include "kernels.h"
#include "tile_attention.h"

namespace longswift {

// Keys of a panel, and query rows whose scores of one are held at once.
constexpr int64_t kPanel = 512;
constexpr int64_t kRows = 128;
// Of scores, packed keys and rows: oneDNN compiles and keeps a product for every shape it meets.
constexpr int64_t kStep = kPanel + 16;
constexpr int64_t kWidths = 64;
constexpr int64_t kHeights = 32;

// Packed keys and values of a stretch, panel after panel.
template <typename F>
struct Packed {
  F *keys, *values;
};

// T: the inputs, F: factors of products. One KV head and the query heads of its group.
template <typename T, typename F>
class Tiles {
 public:
  Tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
        const at::Tensor& lse, int64_t batch, int64_t head, const Rectangle& shape, float scale)
      : dim_(q.size(3)),
        value_dim_(v.size(3)),
        heads_(q.size(1) / k.size(1)),
        batch_(batch),
        first_head_(head * heads_),
        scale_(scale),
        shape_(shape),
        q_(q),
        out_(out),
        lse_(lse),
        k_(rows_of<const T>(k, batch, head)),
        v_(rows_of<const T>(v, batch, head)),
        unit_(takes_tiles<F>(dim_, value_dim_)),
        mine_(of_thread<Space>()) {}

  // Packs the panel that begins `p` keys after the first of a tile.
  void pack(int64_t key, int64_t p, const Packed<F>& to) {
    const int64_t some = std::min(kPanel, shape_.width - p), whole = round_up(some, kWidths);
    int64_t step;
    const F* keys = factors<T, F>(k_, key + p, some, dim_, mine_.keys, &step);
#if defined(LONGSWIFT_PAIRS)
    if constexpr (kNarrow) {
      if (unit_.used()) {
        const TileAttention tiles(dim_, value_dim_, scale_);
        tiles.pack_keys(keys, step, some, to.keys + p * dim_);
        tiles.pack_values(v_.row(key + p), v_.step, some, to.values + p * value_dim_);
        return;
      }
    }
#endif
    pack_transposed<F>(keys, step, some, dim_, to.keys + p * dim_, whole);
    clear_columns<F>(to.keys + p * dim_, dim_, whole, some, whole);
    const F* values = factors<T, F>(v_, key + p, some, value_dim_, mine_.values, &step);
    pack_pairs<F>(values, step, some, value_dim_, to.values + p * value_dim_, whole);
  }

  // Rows [first, +rows) of the tile that begins at `row`, at most `kRows`, of a head of the group.
  void attend(const Packed<F>& packed, int64_t g, int64_t row, int64_t first, int64_t rows) {
#if defined(LONGSWIFT_PAIRS)
    if constexpr (kNarrow) {
      if (unit_.used()) {
        attend_by_unit(packed, g, row, first, rows);
        return;
      }
    }
#endif
    const int64_t tall = round_up(rows, kHeights);
    int64_t step;
    const F* queries = rows_to_multiply(g, row + first, rows, tall, &step);
    float* scores = mine_.scores.get(tall * kStep);
    F* probs = mine_.probs.get(tall * kStep);
    float* part = mine_.part.get(tall * value_dim_);
    float *top = mine_.top.get(rows), *total = mine_.total.get(rows);
    std::fill(top, top + rows, kHidden);
    std::fill(total, total + rows, 0.0f);
    // What lies there by chance may be slow to multiply.
    std::fill(probs + rows * kStep, probs + tall * kStep, F(0.0f));
    const int64_t begin = first_key(first) / kPanel * kPanel, end = end_key(first + rows - 1);
    if (begin >= end) {
      std::fill(part, part + rows * value_dim_, 0.0f);
    }
    for (int64_t p = begin; p < end; p += kPanel) {
      const int64_t whole = round_up(std::min(kPanel, shape_.width - p), kWidths);
      const int64_t some = std::min(whole, round_up(end - p, kHeights));
      multiply<F>(tall, some, dim_, queries, step, packed.keys + p * dim_, whole, scores, kStep);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t low = std::max<int64_t>(0, first_key(first + i) - p);
        const int64_t high = std::min(some, end_key(first + i) - p);
        weigh(scores + i * kStep, some, low, high, probs + i * kStep, part + i * value_dim_,
              top + i, total + i);
      }
      multiply<F>(tall, value_dim_, some, probs, kStep, packed.values + p * value_dim_, value_dim_,
                  part, value_dim_, p > begin);
    }
    store(g, row + first, rows, part, top, total);
  }

 private:
  static constexpr bool kNarrow = std::is_same_v<F, at::BFloat16>;

  struct Space {
    Buffer<F> keys, values, queries, probs;
    Buffer<float> scores, part, top, total, sums;
  };

#if defined(LONGSWIFT_PAIRS)
  // A panel of keys at a time for all rows, so that it comes from a near cache.
  void attend_by_unit(const Packed<F>& packed, int64_t g, int64_t row, int64_t first,
                      int64_t rows) {
    constexpr int64_t some = TileAttention::kRows, lines = TileAttention::kLines;
    const TileAttention tiles(dim_, value_dim_, scale_);
    const int64_t tall = round_up(rows, some);
    const F* queries = copied(g, row + first, rows, tall);
    float* part = mine_.part.get(tall * value_dim_);
    float* sums = mine_.sums.get(tall * lines);
    float *top = mine_.top.get(tall), *total = mine_.total.get(rows);
    const auto state = [&](int64_t i) {
      return TileState{part + i * value_dim_, sums + i * lines, top + i};
    };
    for (int64_t i = 0; i < tall; i += some) {
      tiles.begin(state(i));
    }
    const int64_t last_key = end_key(first + rows - 1);
    for (int64_t p = first_key(first) / kPanel * kPanel; p < last_key; p += kPanel) {
      for (int64_t i = 0; i < rows; i += some) {
        const int64_t last = std::min(i + some, rows) - 1, place = shape_.shift + first + i;
        const int64_t from = std::max(p, first_key(first + i) / kWidths * kWidths);
        tiles.add(queries + i * dim_, state(i), packed.keys, packed.values, from,
                  std::min(p + kPanel, end_key(first + last)), place - shape_.behind,
                  place + shape_.ahead + 1);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      total[i] = TileAttention::total(state(0), i);
      if (total[i] == 0.0f && first_key(first + i) < end_key(first + i)) {
        // All of a row's scores are below every number.
        total[i] = std::numeric_limits<float>::quiet_NaN();
      }
      top[i] /= kLog2e;
    }
    store(g, row + first, rows, part, top, total);
  }
#endif

  // Keys that the row at place `i` of the tile sees: [first, end).
  int64_t first_key(int64_t i) const {
    return std::max<int64_t>(0, shape_.shift + i - shape_.behind);
  }
  int64_t end_key(int64_t i) const {
    return std::min(shape_.width, shape_.shift + i + shape_.ahead + 1);
  }

  // Query rows where they are, or a copy of `tall` of them.
  const F* rows_to_multiply(int64_t g, int64_t first, int64_t rows, int64_t tall, int64_t* step) {
    const Rows<const T> from = rows_of<const T>(q_, batch_, first_head_ + g);
    if (rows == tall) {
      return factors<T, F>(from, first, rows, dim_, mine_.queries, step);
    }
    *step = dim_;
    return copied(g, first, rows, tall);
  }

  const F* copied(int64_t g, int64_t first, int64_t rows, int64_t tall) {
    const Rows<const T> from = rows_of<const T>(q_, batch_, first_head_ + g);
    F* copy = mine_.queries.get(tall * dim_);
    for (int64_t i = 0; i < rows; ++i) {
      convert(copy + i * dim_, from.row(first + i), dim_);
    }
    std::fill(copy + rows * dim_, copy + tall * dim_, F(0.0f));
    return copy;
  }

  void store(int64_t g, int64_t row, int64_t rows, float* part, const float* top,
             const float* total) {
    const Rows<T> out = rows_of<T>(out_, batch_, first_head_ + g);
    float* lse = lse_.data_ptr<float>() + batch_ * lse_.stride(0) +
        (first_head_ + g) * lse_.stride(1) + row;
    for (int64_t i = 0; i < rows; ++i) {
      const bool sees = total[i] != 0.0f;
      const Vec by(sees ? 1.0f / total[i] : 0.0f);
      const float* mean = part + i * value_dim_;
      T* to = out.row(row + i);
      for (int64_t d = 0; d < value_dim_; d += kLanes) {
        convert(to + d, Vec::loadu(mean + d) * by);
      }
      lse[i] = sees ? top[i] + std::log(total[i]) : kHidden;
    }
  }

  // Turns the scores [low, high) of a row into unnormalised probabilities, the others into zeros,
  // and carries what the row has summed so far over to its new maximum.
  void weigh(float* scores, int64_t width, int64_t low, int64_t high, F* probs, float* part,
             float* top, float* total) {
    if (high <= low) {
      std::memset(static_cast<void*>(probs), 0, width * sizeof(F));
      return;
    }
    if (low > 0) {
      std::fill(scores, scores + low, kHidden);
    }
    const int64_t end = round_up(high, kLanes);
    if (high < end) {
      float* last = scores + end - kLanes;
      const auto shown = Vec::arange(0.0f, 1.0f) < Vec(static_cast<float>(high - (end - kLanes)));
      Vec::blendv(Vec(kHidden), Vec::loadu(last), shown).store(last);
    }
    float highest = scale_ * max_over(scores, end);
    if (highest <= *top) {
      highest = *top;
    } else if (*total > 0.0f) {
      const float shrink = *top - highest > kNegligible ? std::exp(*top - highest) : 0.0f;
      *total *= shrink;
      for (int64_t d = 0; d < value_dim_; ++d) {
        part[d] *= shrink;
      }
    }
    *top = highest;
    *total += exponentials(scores, end, scale_, highest, probs);
    std::memset(static_cast<void*>(probs + end), 0, (width - end) * sizeof(F));
  }

  const int64_t dim_, value_dim_, heads_, batch_, first_head_;
  const float scale_;
  const Rectangle& shape_;
  const at::Tensor &q_, &out_, &lse_;
  const Rows<const T> k_, v_;
  const TileUnit unit_;
  Space& mine_;
};

}  // namespace longswift
