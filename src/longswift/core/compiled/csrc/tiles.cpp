// Attention of rectangles: tiles of queries against a contiguous stretch of keys.
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

// Keys of a panel, and query rows whose scores of one are held at once.
constexpr int64_t kPanel = 512;
constexpr int64_t kRows = 128;
// Of scores and packed keys: oneDNN compiles and keeps a product for every shape it meets.
constexpr int64_t kStep = kPanel + 16;
constexpr int64_t kWidths = 64;

template <typename F>
struct Space {
  Buffer<F> keys, values, packed_keys, packed_values, queries, probs;
  Buffer<float> scores, part, top, total;
};

template <typename F>
Space<F>& space() {
  static thread_local Space<F> mine;
  return mine;
}

template <typename T, typename F>
class Tiles {
 public:
  Tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& out,
        at::Tensor& lse, int64_t batch, int64_t head, const Rectangle& shape, float scale)
      : shape_(shape),
        scale_(scale),
        dim_(q.size(3)),
        value_dim_(v.size(3)),
        heads_(q.size(1) / k.size(1)),
        k_(rows_of<const T>(k, batch, head)),
        v_(rows_of<const T>(v, batch, head)),
        mine_(space<F>()) {
    for (int64_t g = 0; g < heads_; ++g) {
      const int64_t own = head * heads_ + g;
      q_.push_back(rows_of<const T>(q, batch, own));
      out_.push_back(rows_of<T>(out, batch, own));
      lse_.push_back(lse.data_ptr<float>() + batch * lse.stride(0) + own * lse.stride(1));
    }
  }

  void run() {
    for (int64_t n = 0; n < shape_.count; ++n) {
      const int64_t key = shape_.key + n * shape_.step, row = shape_.row + n * shape_.step;
      pack(key);
      for (int64_t first = 0; first < shape_.rows; first += kRows) {
        const int64_t rows = std::min(kRows, shape_.rows - first);
        for (int64_t g = 0; g < heads_; ++g) {
          attend(g, row, first, rows);
        }
      }
    }
  }

 private:
  // Keys that the row at place `i` of the tile sees: [first, end).
  int64_t first_key(int64_t i) const {
    return std::max<int64_t>(0, shape_.shift + i - shape_.behind);
  }
  int64_t end_key(int64_t i) const {
    return std::min(shape_.width, shape_.shift + i + shape_.ahead + 1);
  }

  void pack(int64_t key) {
    const int64_t width = shape_.width, padded = round_up(width, kWidths);
    F* packed_keys = mine_.packed_keys.get(padded * dim_);
    F* packed_values = mine_.packed_values.get(padded * value_dim_);
    for (int64_t p = 0; p < width; p += kPanel) {
      const int64_t some = std::min(kPanel, width - p), whole = round_up(some, kWidths);
      int64_t step;
      const F* keys = factors<T, F>(k_, key + p, some, dim_, mine_.keys, &step);
      pack_transposed<F>(keys, step, some, dim_, packed_keys + p * dim_, whole);
      clear_columns<F>(packed_keys + p * dim_, dim_, whole, some, whole);
      const F* values = factors<T, F>(v_, key + p, some, value_dim_, mine_.values, &step);
      pack_pairs<F>(values, step, some, value_dim_, packed_values + p * value_dim_, whole);
    }
  }

  void attend(int64_t g, int64_t row, int64_t first, int64_t rows) {
    int64_t step;
    const F* queries = factors<T, F>(q_[g], row + first, rows, dim_, mine_.queries, &step);
    float* scores = mine_.scores.get(rows * kStep);
    F* probs = mine_.probs.get(rows * kStep);
    float* part = mine_.part.get(rows * value_dim_);
    float *top = mine_.top.get(rows), *total = mine_.total.get(rows);
    std::fill(top, top + rows, kHidden);
    std::fill(total, total + rows, 0.0f);
    const int64_t begin = first_key(first) / kPanel * kPanel, end = end_key(first + rows - 1);
    std::fill(part, part + rows * value_dim_, 0.0f);
    for (int64_t p = begin; p < end; p += kPanel) {
      const int64_t whole = round_up(std::min(kPanel, shape_.width - p), kWidths);
      const int64_t some = std::min(whole, round_up(end - p, kWidths));
      multiply<F>(rows, some, dim_, queries, step, mine_.packed_keys.get(0) + p * dim_, whole,
                  scores, kStep);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t low = std::max<int64_t>(0, first_key(first + i) - p);
        const int64_t high = std::min(some, end_key(first + i) - p);
        weigh(scores + i * kStep, some, low, high, probs + i * kStep, part + i * value_dim_,
              top + i, total + i);
      }
      multiply<F>(rows, value_dim_, some, probs, kStep,
                  mine_.packed_values.get(0) + p * value_dim_, value_dim_, part, value_dim_, true);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool sees = total[i] > 0.0f;
      const float by = sees ? 1.0f / total[i] : 0.0f;
      float* mean = part + i * value_dim_;
      for (int64_t d = 0; d < value_dim_; ++d) {
        mean[d] *= by;
      }
      convert(out_[g].row(row + first + i), mean, value_dim_);
      lse_[g][row + first + i] = sees ? top[i] + std::log(total[i]) : kHidden;
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
    std::fill(scores + high, scores + width, kHidden);
    float highest = scale_ * max_over(scores + low, high - low);
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
    *total += exponentials(scores, width, scale_, highest, probs);
  }

  const Rectangle& shape_;
  const float scale_;
  const int64_t dim_, value_dim_, heads_;
  const Rows<const T> k_, v_;
  Space<F>& mine_;
  std::vector<Rows<const T>> q_;
  std::vector<Rows<T>> out_;
  std::vector<float*> lse_;
};

}  // namespace

void attend_tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out,
                  at::Tensor lse, at::IntArrayRef places, double scale, bool narrow) {
  by_types(q.scalar_type(), narrow, [&](auto in, auto factor) {
    for_each_place(places, 11, [&](at::IntArrayRef at) {
      const Rectangle shape{at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10]};
      Tiles<decltype(in), decltype(factor)>(q, k, v, out, lse, at[0], at[1], shape,
                                            static_cast<float>(scale))
          .run();
    });
  });
}

}  // namespace longswift
