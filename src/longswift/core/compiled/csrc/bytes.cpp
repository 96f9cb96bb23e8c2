// Keys as bytes, on a step that the keys before a block of queries set.
#include "bytes.h"

#include "kernels.h"
#include "tile_unit.h"

namespace longswift {

namespace {

// Keys that have an extent together.
constexpr int64_t kStretch = 64;
// The most that rounding to bytes may move a score, as a standard deviation.
constexpr float kNoise = 0.1f;
// Steps beyond which products of bytes are no use as numbers.
constexpr int32_t kFarLevel = 160;

template <typename Call>
void by_type(at::ScalarType type, Call&& call) {
  by_types(type, true, [&](auto in, auto) { call(in); });
}

// The level of the step of keys, or none: where rounding them and the rows of a block would move
// scores too far. Squares are those of a row, on average.
int32_t level_for(const Extent& rows, const Extent& keys, float scale) {
  if (!(rows.peak > 0.0f) || !(keys.peak > 0.0f) || scale == 0.0f) {
    return kNoBytes;
  }
  const int32_t level = step_level(keys.peak);
  if (std::abs(level) > kFarLevel || std::abs(step_level(rows.peak)) > kFarLevel) {
    return kNoBytes;
  }
  const float of_keys = step_at(level), of_rows = rows.peak / kMostSteps;
  // A rounded number is off by a step over the root of twelve.
  const float moved =
      (of_keys * of_keys * rows.squares + of_rows * of_rows * keys.squares) / 12.0f;
  return scale * scale * moved <= kNoise * kNoise ? level : kNoBytes;
}

}  // namespace

bool multiplies_bytes() {
  return TileUnit::there();
}

void raise_extents(const at::Tensor& k, at::Tensor extents) {
  const int64_t heads = k.size(1), dim = k.size(3), stretches = extents.size(2);
  const int64_t all = k.size(0) * heads;
  auto* out = reinterpret_cast<Extent*>(extents.data_ptr<float>());
  by_type(k.scalar_type(), [&](auto in) {
    // A thread takes some at a time.
    constexpr int64_t some = 16;
    const int64_t parts = (stretches + some - 1) / some;
    for_each_index(all * parts, [&](int64_t i) {
      const int64_t head = i / parts, first = i % parts * some;
      const auto rows = rows_of<const decltype(in)>(k, head / heads, head % heads);
      for (int64_t s = first; s < std::min(first + some, stretches); ++s) {
        out[head * stretches + s] = extent_of(rows, s * kStretch, kStretch, dim);
      }
    });
  });
  for (int64_t i = 0; i < all * stretches; ++i) {
    if (i % stretches > 0) {
      out[i].join(out[i - 1]);
    }
  }
}

void find_levels(const at::Tensor& q, const at::Tensor& k, const at::Tensor& extents,
                 const at::Tensor& edges, at::Tensor levels, at::IntArrayRef run, double scale,
                 bool causal) {
  const int64_t first = run[0], row = run[1], rows = run[2], dim = q.size(3);
  const int64_t heads = levels.size(1), count = levels.size(2), group = q.size(1) / heads;
  const auto* known = reinterpret_cast<const Extent*>(extents.data_ptr<float>());
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
      Extent of_rows, of_keys;
      for (int64_t g = 0; g < group; ++g) {
        const auto x = rows_of<const T>(q, batch, head * group + g);
        of_rows.join(extent_of(x, row + n * rows, rows, dim));
      }
      of_rows.squares /= static_cast<float>(group * rows);
      const int64_t whole = keys / kStretch;
      if (whole > 0) {
        of_keys = known[(batch * heads + head) * extents.size(2) + whole - 1];
      }
      if (keys > whole * kStretch) {
        const auto x = rows_of<const T>(k, batch, head);
        of_keys.join(extent_of(x, whole * kStretch, keys - whole * kStretch, dim));
      }
      of_keys.squares /= static_cast<float>(keys);
      level = level_for(of_rows, of_keys, static_cast<float>(scale));
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
        to_bytes(rows.row(r), dim, inverse, out.row(r), padded);
      }
    });
  });
}

}  // namespace longswift
