// Few query rows, as when decoding: keys and values are read once, where they lie.
#pragma once

#include "common.h"
#include "kernels.h"

namespace longswift {

// Rows for which this is faster than products with packed keys, most of whose rows would be nobody's.
constexpr int64_t kFewRows = 16;

// Keys of a tile, whose scores lie in the nearest cache, and how many keys are fetched before they are
// needed.
constexpr int64_t kFewKeys = 128, kAhead = 32;

template <typename T>
void scaled_line(float* line, const T* query, int64_t dim, float scale) {
  convert(line, query, dim);
  for (int64_t d = 0; d < dim; ++d) {
    line[d] *= scale;
  }
}

// Keys, and the lines of `dim` numbers, one for every row, that they are multiplied with.
template <typename T>
struct Met {
  const T* keys[kLanes];
  const float* lines;
};

// Products of as many keys as there are lanes with some rows, sums of the `parts` of `met`.
template <int rows, typename T>
[[gnu::always_inline]] inline void score_lanes(const Met<T>* met, int parts, int64_t dim, float* out,
                                               int64_t step) {
  constexpr int64_t together = kLanes / rows;
  for (int64_t first = 0; first < kLanes; first += together) {
    Vec sums[kLanes];
    std::fill_n(sums, kLanes, Vec(0.0f));
    for (int p = 0; p < parts; ++p) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vec line[rows];
#pragma GCC unroll 4
        for (int64_t r = 0; r < rows; ++r) {
          line[r] = Vec::loadu(met[p].lines + r * dim + d);
        }
#pragma GCC unroll 16
        for (int64_t j = 0; j < together; ++j) {
          const Vec key = floats_at(met[p].keys[first + j] + d);
#pragma GCC unroll 4
          for (int64_t r = 0; r < rows; ++r) {
            sums[r * together + j] = at::vec::fmadd(key, line[r], sums[r * together + j]);
          }
        }
      }
    }
    float scores[kLanes];
    sum_of_each(sums).store(scores);
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(out + r * step + first, scores + r * together, together * sizeof(float));
    }
  }
}

// Scores `out [rows, *]`, rows `step` apart, of `count` keys, rounded up to the lanes; what lies behind
// them is of no key. `find(i, p)` is key `i` of part `p`, whose lines are `lines[p] [rows, dim]`.
template <typename T, int parts, typename Find>
void score_keys(const Find& find, const float* const (&lines)[parts], int64_t count, int64_t rows,
                int64_t dim, float* out, int64_t step) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Met<T> met[parts];
    for (int p = 0; p < parts; ++p) {
      for (int64_t l = 0; l < kLanes; ++l) {
        met[p].keys[l] = find(std::min(i + l, count - 1), p);
        if (i + l + kAhead < count) {
          fetch_row(find(i + l + kAhead, p), dim);
        }
      }
    }
    for (int64_t r = 0, some; r < rows; r += some) {
      for (int p = 0; p < parts; ++p) {
        met[p].lines = lines[p] + r * dim;
      }
      some = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
      float* to = out + r * step + i;
      if (some == 4) {
        score_lanes<4>(met, parts, dim, to, step);
      } else if (some == 2) {
        score_lanes<2>(met, parts, dim, to, step);
      } else {
        score_lanes<1>(met, parts, dim, to, step);
      }
    }
  }
}

// Attention of some rows to keys that come in any order, some at a time. Sums are those of weights
// relative to the largest score of a row.
class FewRows {
 public:
  FewRows(int64_t rows, int64_t dim, int64_t value_dim, float scale)
      : rows_(rows), dim_(dim), value_dim_(value_dim), scale_(scale), mine_(of_thread<Space>()) {
    lines_ = mine_.lines.get(rows * dim);
    part_ = mine_.part.get(rows * value_dim);
    tops_ = mine_.tops.get(rows);
    totals_ = mine_.totals.get(rows);
    std::fill(part_, part_ + rows * value_dim, 0.0f);
    std::fill(tops_, tops_ + rows, kHidden);
    std::fill(totals_, totals_ + rows, 0.0f);
  }

  template <typename T>
  void set(int64_t row, const T* query) {
    scaled_line(lines_ + row * dim_, query, dim_, scale_);
  }

  // Adds `count` keys: `key(i)` and `value(i)` are where they lie, `bias` is added to their scores
  // unless it is null, and a row sees no more of them than `visible` says.
  template <typename T, typename Key, typename Value>
  void add(int64_t count, const Key& key, const Value& value, const float* bias = nullptr,
           const int64_t* visible = nullptr) {
    float* scores = mine_.scores.get(rows_ * kFewKeys);
    for (int64_t first = 0; first < count; first += kFewKeys) {
      const int64_t some = std::min(kFewKeys, count - first);
      const float* const lines[] = {lines_};
      const auto find = [&](int64_t i, int) { return key(first + i); };
      score_keys<T, 1>(find, lines, some, rows_, dim_, scores, kFewKeys);
      for (int64_t i = 0; i < some; ++i) {
        if (first + some + i < count && i < kAhead) {
          fetch_row(key(first + some + i), dim_);
        }
        fetch_row(value(first + i), value_dim_);
      }
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t seen = visible == nullptr ? some : std::clamp<int64_t>(visible[r] - first, 0, some);
        weigh(r, scores + r * kFewKeys, some, seen, bias == nullptr ? nullptr : bias + first);
      }
      const auto find_value = [&](int64_t i) { return value(first + i); };
      add_values<T>(find_value, some, scores);
    }
  }

  int64_t count() const { return rows_; }
  bool sees(int64_t row) const { return totals_[row] != 0.0f; }

  // Of each row: the sum of weighted values, the largest score, the sum of weights.
  const float* part() const { return part_; }
  const float* tops() const { return tops_; }
  const float* totals() const { return totals_; }

  // Writes a row's mean value and the logarithm of its sum.
  template <typename T>
  void store(int64_t row, T* out, float* lse) const {
    const Vec by(sees(row) ? 1.0f / totals_[row] : 0.0f);
    for (int64_t d = 0; d < value_dim_; d += kLanes) {
      convert(out + d, Vec::loadu(part_ + row * value_dim_ + d) * by);
    }
    *lse = sees(row) ? tops_[row] + std::log(totals_[row]) : kHidden;
  }

  // Writes what all rows saw, `saved_size` numbers.
  void save(float* to) const {
    to = std::copy_n(part_, rows_ * value_dim_, to);
    to = std::copy_n(tops_, rows_, to);
    std::copy_n(totals_, rows_, to);
  }
  int64_t saved_size() const { return rows_ * (value_dim_ + 2); }

  // Adds what as many rows saw elsewhere.
  void add_saved(const float* saved) {
    const float *tops = saved + rows_ * value_dim_, *totals = tops + rows_;
    for (int64_t r = 0; r < rows_; ++r) {
      if (totals[r] == 0.0f) {
        continue;
      }
      const float top = std::max(tops_[r], tops[r]);
      const float keep = std::exp(tops_[r] - top), by = std::exp(tops[r] - top);
      float* part = part_ + r * value_dim_;
      for (int64_t d = 0; d < value_dim_; ++d) {
        part[d] = part[d] * keep + saved[r * value_dim_ + d] * by;
      }
      tops_[r] = top;
      totals_[r] = totals_[r] * keep + totals[r] * by;
    }
  }

  // Whether every score and every sum is a number.
  bool finite() const {
    float check = doubt_;
    for (int64_t i = 0; i < rows_ * value_dim_; ++i) {
      check += part_[i] * 0.0f;
    }
    return check == 0.0f;
  }

 private:
  struct Space {
    Buffer<float> lines, scores, part, tops, totals;
  };

  static constexpr int kTogether = kLanes == 16 ? 4 : 2;

  // Turns `count` scores, of which a row sees the first few, into weights.
  void weigh(int64_t row, float* scores, int64_t count, int64_t seen, const float* bias) {
    const int64_t end = round_up(count, kLanes);
    Vec doubt(0.0f);
    for (int64_t i = 0; i < end; i += kLanes) {
      // NaN and infinity leave NaN, all others nothing.
      doubt = at::vec::fmadd(Vec::loadu(scores + i), Vec(0.0f), doubt);
    }
    doubt_ += sum_of(doubt);
    for (int64_t i = 0; bias != nullptr && i < count; ++i) {
      scores[i] += bias[i];
    }
    if (seen == 0) {
      std::fill(scores, scores + end, 0.0f);
      return;
    }
    std::fill(scores + seen, scores + end, kHidden);
    float highest = max_over(scores, end);
    float& top = tops_[row];
    if (highest <= top) {
      highest = top;
    } else if (totals_[row] > 0.0f) {
      const float shrink = top - highest > kNegligible ? std::exp(top - highest) : 0.0f;
      totals_[row] *= shrink;
      float* part = part_ + row * value_dim_;
      for (int64_t d = 0; d < value_dim_; ++d) {
        part[d] *= shrink;
      }
    }
    top = highest;
    totals_[row] += exponentials(scores, end, 1.0f, highest, scores);
  }

  template <typename T, typename Value>
  void add_values(const Value& value, int64_t count, const float* weights) {
    for (int64_t c = 0, wide; c < value_dim_; c += wide) {
      const bool whole = value_dim_ - c >= kTogether * kLanes;
      wide = whole ? kTogether * kLanes : kLanes;
      for (int64_t r = 0, some; r < rows_; r += some) {
        some = rows_ - r >= kTogether ? kTogether : 1;
        float* to = part_ + r * value_dim_ + c;
        const float* of_rows = weights + r * kFewKeys;
        if (whole) {
          some == 1 ? add_to<1, kTogether, T>(value, c, count, of_rows, to)
                    : add_to<kTogether, kTogether, T>(value, c, count, of_rows, to);
        } else {
          some == 1 ? add_to<1, 1, T>(value, c, count, of_rows, to)
                    : add_to<kTogether, 1, T>(value, c, count, of_rows, to);
        }
      }
    }
  }

  template <int rows, int wide, typename T, typename Value>
  void add_to(const Value& value, int64_t channel, int64_t count, const float* weights,
              float* to) const {
    Vec sums[rows][wide];
    for (int r = 0; r < rows; ++r) {
      for (int w = 0; w < wide; ++w) {
        sums[r][w] = Vec::loadu(to + r * value_dim_ + w * kLanes);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* from = value(i) + channel;
      Vec line[wide];
#pragma GCC unroll 4
      for (int w = 0; w < wide; ++w) {
        line[w] = floats_at(from + w * kLanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec by(weights[r * kFewKeys + i]);
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) {
          sums[r][w] = at::vec::fmadd(by, line[w], sums[r][w]);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int w = 0; w < wide; ++w) {
        sums[r][w].store(to + r * value_dim_ + w * kLanes);
      }
    }
  }

  const int64_t rows_, dim_, value_dim_;
  const float scale_;
  Space& mine_;
  float *lines_, *part_, *tops_, *totals_;
  float doubt_ = 0.0f;
};

}  // namespace longswift
