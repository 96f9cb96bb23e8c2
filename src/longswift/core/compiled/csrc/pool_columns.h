// Which pools, whole or cut, a block of queries sees outside its band.
#pragma once

#include <algorithm>
#include <cstdint>

namespace longswift {

// The columns of a block's remainder: whole pools before the band, the cut one, the cut one after the
// band, whole pools behind that.
struct PoolColumns {
  int64_t size = 0, start = 0, end = 0, left = 0, after = 0, right_end = 0, count = 0;
  bool cuts = false;

  PoolColumns() = default;
  PoolColumns(int64_t size, int64_t start, int64_t end, int64_t keys, int64_t pools, bool causal)
      : size(size), start(start), end(end), left(start / size) {
    const bool right = !causal && end < keys;
    after = right ? (end + size - 1) / size : pools;
    cuts = right && end % size > 0;
    right_end = cuts ? std::min((end / size + 1) * size, keys) : end;
    count = left + 2 + pools - after;
  }

  // The column of the pool that a token belongs to.
  int64_t of_token(int64_t token) const {
    if (token < end) {
      return token / size;
    }
    return cuts && token < right_end ? left + 1 : left + 2 + token / size - after;
  }

  // The whole pool of a column, or -1.
  int64_t pool(int64_t column) const {
    return column < left ? column : column < left + 2 ? -1 : column - left - 2 + after;
  }

  // Tokens of a cut pool.
  int64_t cut(int64_t column) const {
    return column == left ? start - left * size : right_end - end;
  }

  // Calls with every grain of a cut pool.
  template <typename Call>
  void for_each_grain(int64_t column, int64_t grain, const Call& call) const {
    const int64_t first = column == left ? left * size : end;
    const int64_t last = first + cut(column);
    for (int64_t g = first / grain; first < last && g * grain < last; ++g) {
      call(g);
    }
  }
};

}  // namespace longswift
