// Keys as bytes, on a step that the keys before a block of queries set.
#include "bytes.h"

#include "kernels.h"
#include "tile_unit.h"

namespace longswift {

namespace {

// Keys that have an extent together.
constexpr int64_t kStretch = 64;
// What rounding to bytes may move a score, as a standard deviation: so much, or such a share of how much
// scores of keys differ.
constexpr float kNoise = 0.1f, kNoiseShare = 0.04f;
// Steps beyond which products of bytes are no use as numbers.
constexpr int32_t kFarLevel = 160;

// Of some rows: the largest absolute number, and every channel's sum and sum of squares.
class Extent {
 public:
  static int64_t numbers(int64_t dim) { return 1 + 2 * dim; }

  Extent(float* numbers, int64_t dim) : numbers_(numbers), dim_(dim) {}

  float& peak() const { return numbers_[0]; }
  float* sums() const { return numbers_ + 1; }
  float* squares() const { return numbers_ + 1 + dim_; }

  void clear() const { std::fill(numbers_, numbers_ + numbers(dim_), 0.0f); }

  template <typename T>
  void add(const Rows<const T>& x, int64_t first, int64_t count) const {
    Vec peaks(0.0f);
    for (int64_t d = 0; d < dim_; d += kLanes) {
      const int64_t some = std::min(kLanes, dim_ - d);
      Vec sum(0.0f), square(0.0f), others(0.0f), other_squares(0.0f);
      const auto take = [&](int64_t i, Vec& here, Vec& squares_here) __attribute__((always_inline)) {
        const Vec values = floats_at(x.row(i) + d, some);
        peaks = larger(peaks, values.abs());
        here += values;
        squares_here = at::vec::fmadd(values, values, squares_here);
      };
      // One sum alone would wait for itself.
      int64_t i = first;
      for (; i + 1 < first + count; i += 2) {
        take(i, sum, square);
        take(i + 1, others, other_squares);
      }
      if (i < first + count) {
        take(i, sum, square);
      }
      (Vec::loadu(sums() + d, some) + sum + others).store(sums() + d, some);
      (Vec::loadu(squares() + d, some) + square + other_squares).store(squares() + d, some);
    }
    peak() = std::max(peak(), max_of(peaks));
  }

  void add(const Extent& other) const {
    const float highest = std::max(peak(), other.peak());
    for (int64_t i = 0; i < numbers(dim_); ++i) {
      numbers_[i] += other.numbers_[i];
    }
    peak() = highest;
  }

 private:
  float* numbers_;
  const int64_t dim_;
};

template <typename Call>
void by_type(at::ScalarType type, Call&& call) {
  by_types(type, true, [&](auto in, auto) { call(in); });
}

// The level of the step of some keys, or none: where rounding them and the rows of a block would move
// scores too far.
int32_t level_for(const Extent& rows, int64_t row_count, const Extent& keys, int64_t key_count,
                  int64_t dim, float scale) {
  if (!(rows.peak() > 0.0f) || !(keys.peak() > 0.0f) || scale == 0.0f) {
    return kNoBytes;
  }
  const int32_t level = step_level(keys.peak());
  if (std::abs(level) > kFarLevel || std::abs(step_level(rows.peak())) > kFarLevel) {
    return kNoBytes;
  }
  const float of_keys = step_at(level), of_rows = rows.peak() / kMostSteps;
  float row_squares = 0.0f, key_squares = 0.0f, differ = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float row = rows.squares()[d] / row_count, key = keys.squares()[d] / key_count;
    const float mean = keys.sums()[d] / key_count;
    row_squares += row;
    key_squares += key;
    differ += row * std::max(key - mean * mean, 0.0f);
  }
  // A rounded number is off by a step over the root of twelve.
  const float moved = (of_keys * of_keys * row_squares + of_rows * of_rows * key_squares) / 12.0f;
  const float allowed =
      std::max(kNoise * kNoise / (scale * scale), kNoiseShare * kNoiseShare * differ);
  return moved <= allowed ? level : kNoBytes;
}

}  // namespace

bool multiplies_bytes() {
  return TileUnit::there<int8_t>();
}

at::Tensor extents_of(const at::Tensor& k) {
  const int64_t heads = k.size(1), dim = k.size(3), stretches = k.size(2) / kStretch;
  const int64_t all = k.size(0) * heads;
  at::Tensor extents = at::empty({k.size(0), heads, stretches, Extent::numbers(dim)},
                                 k.options().dtype(at::kFloat));
  const auto at = [&](int64_t i) {
    return Extent(extents.data_ptr<float>() + i * Extent::numbers(dim), dim);
  };
  by_type(k.scalar_type(), [&](auto in) {
    // A thread takes some at a time.
    constexpr int64_t some = 16;
    const int64_t parts = (stretches + some - 1) / some;
    for_each_index(all * parts, [&](int64_t i) {
      const int64_t head = i / parts, first = i % parts * some;
      const auto rows = rows_of<const decltype(in)>(k, head / heads, head % heads);
      for (int64_t s = first; s < std::min(first + some, stretches); ++s) {
        const Extent extent = at(head * stretches + s);
        extent.clear();
        extent.add(rows, s * kStretch, kStretch);
      }
    });
  });
  for_each_index(all, [&](int64_t head) {
    for (int64_t s = 1; s < stretches; ++s) {
      at(head * stretches + s).add(at(head * stretches + s - 1));
    }
  });
  return extents;
}

void find_levels(const at::Tensor& q, const at::Tensor& k, const at::Tensor& extents,
                 const at::Tensor& edges, at::Tensor levels, at::IntArrayRef run, double scale,
                 bool causal) {
  const int64_t first = run[0], row = run[1], rows = run[2], dim = q.size(3);
  const int64_t heads = levels.size(1), count = levels.size(2), group = q.size(1) / heads;
  by_type(q.scalar_type(), [&](auto in) {
    using T = decltype(in);
    for_each_index(levels.size(0) * heads * count, [&](int64_t i) {
      const int64_t n = i % count, head = i / count % heads, batch = i / count / heads;
      int64_t keys = k.size(2);
      if (causal) {
        const int64_t* edge = edges.data_ptr<int64_t>() + head * edges.stride(0);
        keys = std::min(keys, edge[2 * (first + n)]);
      }
      int32_t& level = levels.data_ptr<int32_t>()[i];
      level = kNoBytes;
      if (keys <= 0) {
        return;
      }
      float numbers[2 * Extent::numbers(dim)];
      const Extent of_rows(numbers, dim), of_keys(numbers + Extent::numbers(dim), dim);
      of_rows.clear();
      of_keys.clear();
      for (int64_t g = 0; g < group; ++g) {
        of_rows.add(rows_of<const T>(q, batch, head * group + g), row + n * rows, rows);
      }
      const int64_t whole = keys / kStretch;
      if (whole > 0) {
        const int64_t known = (batch * heads + head) * extents.size(2) + whole - 1;
        of_keys.add(Extent(extents.data_ptr<float>() + known * Extent::numbers(dim), dim));
      }
      of_keys.add(rows_of<const T>(k, batch, head), whole * kStretch, keys - whole * kStretch);
      level = level_for(of_rows, group * rows, of_keys, keys, dim, static_cast<float>(scale));
    });
  });
}

void round_keys(const at::Tensor& k, at::Tensor bytes, at::IntArrayRef places) {
  const int64_t dim = k.size(3), padded = bytes.size(3);
  by_type(k.scalar_type(), [&](auto in) {
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      const auto rows = rows_of<const decltype(in)>(k, at[0], at[1]);
      const auto out = rows_of<int8_t>(bytes, at[0], at[1]);
      const float inverse = 1.0f / step_at(static_cast<int32_t>(at[4]));
      for (int64_t r = at[2]; r < at[3]; ++r) {
        to_bytes(rows.row(r), dim, inverse, out.row(r), padded, kByteOffset);
      }
    });
  });
}

}  // namespace longswift
