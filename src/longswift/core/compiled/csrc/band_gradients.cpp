// Gradients of bands, a square of queries and keys at a time, scores recomputed.
#include "gradients.h"
#include "kernels.h"

namespace longswift {

namespace {

// Rows, and keys, of a square: as many as leave what belongs to them in a near cache.
constexpr int64_t kSteps = 4;
constexpr int64_t kSquare = kSteps * kSide;

struct Space {
  Buffer<float> keys, columns, values, d_keys, d_values, scores, products;
};

// One KV head and the query heads of its group.
template <typename T>
class Square {
 public:
  Square(const Differentiated& of, const at::Tensor& first, const at::Tensor& end, int64_t batch,
         int64_t head)
      : of_(of),
        batch_(batch),
        head_(head),
        groups_(of.q.size(1) / of.k.size(1)),
        dim_(of.q.size(3)),
        value_dim_(of.v.size(3)),
        first_(first.data_ptr<int32_t>() + head * first.stride(0)),
        end_(end.data_ptr<int32_t>() + head * end.stride(0)),
        rows_(dim_, value_dim_, of.scale),
        mine_(of_thread<Space>()) {}

  // Adds what the square of the rows from `row` and the keys from `key` on contributes.
  void run(int64_t row, int64_t key) {
    const int64_t end_row = std::min(row + kSquare, of_.q.size(2));
    // Of the square's keys those that any row sees.
    const int64_t from = std::max<int64_t>(key, first_[row] / kSide * kSide);
    const int64_t to = std::min<int64_t>(key + kSquare, end_[end_row - 1]);
    if (from >= to) {
      return;
    }
    load(from, to);
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t r = row; r < end_row; r += kSide) {
        attend(head_ * groups_ + g, r, std::min(kSide, end_row - r), from, to);
      }
    }
    const Rows<float> d_k = rows_of<float>(of_.d_k, batch_, head_);
    const Rows<float> d_v = rows_of<float>(of_.d_v, batch_, head_);
    for (int64_t i = 0; i < to - from; ++i) {
      add_rows(d_k.row(from + i), mine_.d_keys.data() + i * dim_, dim_);
      add_rows(d_v.row(from + i), mine_.d_values.data() + i * value_dim_, value_dim_);
    }
  }

 private:
  void load(int64_t from, int64_t to) {
    const Rows<const T> k = rows_of<const T>(of_.k, batch_, head_);
    const Rows<const T> v = rows_of<const T>(of_.v, batch_, head_);
    float *keys = mine_.keys.get(kSquare * dim_), *columns = mine_.columns.get(kSquare * dim_);
    float* values = mine_.values.get(kSquare * value_dim_);
    for (int64_t i = 0; i < to - from; i += kSide) {
      const int64_t some = std::min(kSide, to - from - i);
      load_rows(k, from + i, some, dim_, keys + i * dim_, columns + i * dim_);
      load_rows(v, from + i, some, value_dim_, values + i * value_dim_);
    }
    std::fill_n(mine_.d_keys.get(kSquare * dim_), kSquare * dim_, 0.0f);
    std::fill_n(mine_.d_values.get(kSquare * value_dim_), kSquare * value_dim_, 0.0f);
  }

  void attend(int64_t head, int64_t row, int64_t count, int64_t from, int64_t to) {
    const int64_t last = row + count - 1, place = (batch_ * of_.q.size(1) + head) * of_.q.size(2);
    if (first_[row] >= to || end_[last] <= from) {
      return;
    }
    rows_.load(rows_of<const T>(of_.q, batch_, head), rows_of<const T>(of_.d_out, batch_, head),
               of_.lse.data_ptr<float>() + place, of_.delta.data_ptr<float>() + place, row, count);
    float *scores = mine_.scores.get(kSide * kSide), *products = mine_.products.get(kSide * kSide);
    for (int64_t i = 0; i < to - from; i += kSide) {
      const int64_t key = from + i;
      if (first_[row] >= key + kSide || end_[last] <= key) {
        continue;
      }
      rows_.multiply_keys(kSide, mine_.keys.data() + i * dim_, scores);
      rows_.multiply_values(kSide, mine_.values.data() + i * value_dim_, products);
      if (first_[last] > key || end_[row] < key + kSide) {
        hide(scores, key, row, count);
      }
      for (int64_t j = 0; j < kSide; ++j) {
        rows_.differentiate(scores + j * kSide, products + j * kSide);
      }
      rows_.add(kSide, scores, products, mine_.columns.data() + i * dim_,
                mine_.d_keys.get(0) + i * dim_, mine_.d_values.get(0) + i * value_dim_);
    }
    rows_.store(rows_of<float>(of_.d_q, batch_, head), row, count);
  }

  // A key is seen by neighbouring rows: from the first whose band reaches as far, to the last whose
  // band does not begin behind it.
  void hide(float* scores, int64_t key, int64_t row, int64_t count) const {
    const float hidden = rows_.hidden();
    int64_t before = 0, seen = 0;
    for (int64_t j = 0; j < kSide; ++j, scores += kSide) {
      while (before < count && end_[row + before] <= key + j) {
        ++before;
      }
      while (seen < count && first_[row + seen] <= key + j) {
        ++seen;
      }
      std::fill(scores, scores + before, hidden);
      std::fill(scores + std::max(before, seen), scores + kSide, hidden);
    }
  }

  const Differentiated& of_;
  const int64_t batch_, head_, groups_, dim_, value_dim_;
  const int32_t *first_, *end_;
  QueryRows<T> rows_;
  Space& mine_;
};

}  // namespace

int64_t gradient_square() {
  return kSquare;
}

void add_band_gradients(const Differentiated& of, const at::Tensor& first, const at::Tensor& end,
                        at::IntArrayRef places) {
  by_types(of.q.scalar_type(), false, [&](auto in, auto) {
    for_each_place(places, 4, [&](at::IntArrayRef at) {
      Square<decltype(in)>(of, first, end, at[0], at[1]).run(at[2], at[3]);
    });
  });
}

}  // namespace longswift
