// Key tokens by scores of columns: means of similar rows, or the few rows of a cut block.
#include "few_groups.h"
#include "kernels.h"
#include "lines.h"

namespace longswift {

namespace {

// Ranks of keys a thread holds at once.
constexpr int64_t kRanks = 1 << 23;
// Centroids that share what is read of the keys, and rows that are scored at once for themselves.
constexpr int64_t kRows = 256, kColumns = 128;
// Boxes whose scores by few rows are summed up while they are in the nearest cache.
constexpr int64_t kStretch = 512;

// Of rows for themselves.
template <typename F>
struct Alone {
  Buffer<F> lines, queries, highest, lowest;
  Buffer<float> scores, bounds, part, sums;
  Columns columns;
  Lines rows;
};

template <typename T, typename F, typename K = T>
class ByColumns : FewGroups<T, F, K> {
  using Base = FewGroups<T, F, K>;
  using Maxima = typename Base::Maxima;

 public:
  ByColumns(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
            const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
            const Choice& choice, float key_unit = 1.0f)
      : Base(q, k, band_lse, edges, tokens, batch, head, choice, key_unit),
        alone_(of_thread<Alone<F>>()) {}

  // Blocks [first, first + count) of `rows` queries, the first of which starts at row `row`. They are
  // scored in groups of at most `most` similar ones, key by key; beyond position `far` of twice as
  // many, beyond twice `far` of four times as many. A cut block has no more groups than a complete one.
  void run_centroids(int64_t first, int64_t count, int64_t row, int64_t rows, int64_t most,
                     int64_t far) {
    const auto most_at = [&](int64_t n) {
      const int64_t position = choice_.causal ? k_len_ - q_len_ + row + n * rows : k_len_;
      int64_t together = most;
      for (int64_t reach = far; reach < position; reach *= 2) {
        together *= 2;
      }
      return (together * rows + choice_.block - 1) / choice_.block;
    };
    int64_t done = 0;
    while (done < count) {
      const int64_t block = first + done, at_row = row + done * rows, together = most_at(done);
      if (candidates(block) <= choice_.proposed) {
        const int64_t found = take_all(block);
        if (found > 0) {
          choose(found, at_row, rows, tokens_ + block * choice_.budget);
        }
        ++done;
        continue;
      }
      const int64_t groups = own_.centroids.find(q_, at_row, rows, q_dim_, together);
      const bool few = are_few(block, groups);
      const int64_t wide = Maxima::columns_for(groups);
      int64_t some = few ? blocks_of(groups)
                         : std::min(kRows / wide, kRanks / std::max<int64_t>(blocks_, 1));
      some = std::min(std::max<int64_t>(some, 1), count - done);
      const bool many = has_many(block);
      for (int64_t n = 1; n < some; ++n) {
        if (has_many(block + n) != many || most_at(done + n) != together ||
            candidates(block + n) <= choice_.proposed) {
          some = n;
        }
      }
      if (few) {
        propose_by_few(block, some, at_row, rows, together, groups);
      } else {
        propose_by_centroids(block, some, at_row, rows, together, groups, wide);
      }
      done += some;
    }
  }

  // `rows` rows of one block, each bounded for itself; keys by their extremes `low` and `high`.
  void run_cut(const at::Tensor& low, const at::Tensor& high, int64_t batch, int64_t head,
               int64_t block, int64_t row, int64_t rows) {
    if (reach(block) == 0) {
      return;
    }
    const int64_t start = std::min(before(block), blocks_);
    const int64_t found =
        propose_one_by_one(rows_of<const T>(low, batch, head), rows_of<const T>(high, batch, head),
                           row, rows, start, after(block));
    if (found > 0) {
      choose(found, row, rows, tokens_ + block * choice_.budget);
    }
  }

 private:
  using Base::after;
  using Base::are_few;
  using Base::before;
  using Base::blocks_;
  using Base::blocks_of;
  using Base::candidates;
  using Base::choice_;
  using Base::choose;
  using Base::dim_;
  using Base::has_many;
  using Base::heads_;
  using Base::kCoarse;
  using Base::kEvery;
  using Base::kFirst;
  using Base::kKeys;
  using Base::kSome;
  using Base::k_;
  using Base::k_len_;
  using Base::mine_;
  using Base::own_;
  using Base::pack;
  using Base::propose_by_few;
  using Base::q_;
  using Base::q_dim_;
  using Base::q_len_;
  using Base::raise;
  using Base::reach;
  using Base::take;
  using Base::take_all;
  using Base::tile_of;
  using Base::tokens_;
  using Base::write_means;

  // Blocks [first, first + count), `groups` centroids each, columns for `wide`.
  void propose_by_centroids(int64_t first, int64_t count, int64_t row, int64_t rows, int64_t most,
                            int64_t groups, int64_t wide) {
    F* means = own_.means.get(groups * dim_);
    F* panels = own_.panels.get(round_up(count * wide, Maxima::kPanel) * dim_);
    float* units = own_.units.get(count);
    int64_t last = 0;
    for (int64_t n = 0; n < count; ++n) {
      units[n] = write_means(n, row, rows, most, groups, means);
      pack(means, groups, panels, n * wide, (n + 1) * wide);
      last = std::max(last, reach(first + n));
    }
    const int64_t step = round_up(last, kKeys);
    float* rank = mine_.rank.get(count * step);
    {
      const Maxima maxima(dim_);
      add_up(maxima, first, count, groups, wide, last);
      rank_keys(maxima, first, count, wide, last, rank, step);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = first + n;
      const int64_t start = std::min(before(block), blocks_);
      const int64_t end = choice_.causal ? start : blocks_;
      float* of_block = rank + n * step;
      if (!choice_.causal) {
        std::fill(of_block + start, of_block + std::max(start, after(block)), kHidden);
      }
      const int64_t found = take(of_block, start, after(block), end);
      if (found > 0) {
        choose(found, row + n * rows, rows, tokens_ + block * choice_.budget);
      }
    }
  }

  // Sums of every centroid over its candidates; where there are many, over the best of every 16 of a
  // sample of them.
  void add_up(const Maxima& maxima, int64_t first, int64_t count, int64_t groups,
              int64_t wide, int64_t last) {
    F* tile = own_.tile.get(kKeys * dim_);
    float* scores = own_.sums.get(kKeys * count * wide);
    const F* panels = own_.panels.get(0);
    const float* units = own_.units.get(0);
    const int64_t all = count * wide;
    own_.columns.begin(all, all);
    const bool many = has_many(first);
    const int64_t every = (many ? kEvery : 1) * kKeys;
    for (int64_t t = (many ? kFirst : 0) * kKeys; t < last; t += every) {
      fetch(k_, t + every, std::min(kKeys, last - t - every), dim_);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t start = n * wide;
        float* own = scores + start;
        int64_t step, found;
        if (!many) {
          const F* keys = candidates_of(first + n, t, kKeys, tile, &step, &found);
          maxima.all(keys, step, round_up(found, kSome), panels, start, start + wide, scores, all);
          own_.columns.template add<kCoarse>(own, all, found, units[n], start, wide);
          continue;
        }
        for (int64_t s = t; s < t + kKeys; s += kSome) {
          const F* keys = candidates_of(first + n, s, kSome, tile, &step, &found);
          const int64_t tall = round_up(found, kSome);
          maxima.of_rows(keys, step, tall, panels, start, start + wide, scores, all, [] {});
          own_.columns.template add<kCoarse>(own, all, tall / kSome, units[n], start, wide);
        }
      }
    }
    own_.columns.finish();
    auto* starts = own_.starts.get(all);
    for (int64_t n = 0; n < count; ++n) {
      own_.columns.drop(n * wide + groups, (n + 1) * wide);
      own_.columns.starts(units[n], n * wide, wide, starts);
    }
  }

  // Those of keys [first, first + count) that are candidates of a block, filled up by the last of them.
  const F* candidates_of(int64_t block, int64_t first, int64_t count, F* tile, int64_t* step,
                         int64_t* found) const {
    const int64_t start = std::min(before(block), blocks_), end = after(block);
    const int64_t last = std::min(first + count, blocks_);
    *step = dim_;
    *found = 0;
    if (first + count <= start || (end <= first && first + count <= blocks_)) {
      *found = count;
      int64_t padded;
      return tile_of(first, count, tile, step, &padded);
    }
    for (int64_t k = first; k < last; ++k) {
      if (k < start || k >= end) {
        convert(tile + (*found)++ * dim_, k_.row(k), dim_);
      }
    }
    for (int64_t i = *found; *found > 0 && i < round_up(*found, kSome); ++i) {
      std::memcpy(static_cast<void*>(tile + i * dim_), tile + (*found - 1) * dim_, dim_ * sizeof(F));
    }
    return tile;
  }

  // How little every key's product with one of a block's centroids is below the centroid's sum.
  void rank_keys(const Maxima& maxima, int64_t first, int64_t count, int64_t wide,
                   int64_t last, float* rank, int64_t rank_step) {
    F* tile = own_.tile.get(kKeys * dim_);
    const auto* starts = own_.starts.get(0);
    int64_t n = 0, fetched = 0;
    for (int64_t t = 0; t < last; t += kKeys) {
      // Blocks that reach no further are done with.
      while (reach(first + n) <= t) {
        ++n;
      }
      int64_t step, padded;
      const F* keys = tile_of(t, std::min(kKeys, k_len_ - t), tile, &step, &padded);
      fetched = std::max(fetched, t + kKeys);
      const int64_t limit = std::min(last, t + 2 * kKeys);
      // As many for every 16 keys and 32 columns that the next tile is there in time.
      const int64_t few = std::max<int64_t>(1, 16 * 32 / ((count - n) * wide));
      const auto fetch_few = [&]() __attribute__((always_inline)) {
        for (int64_t i = 0; i < few && fetched < limit; ++i) {
          fetch(k_, fetched++, 1, dim_);
        }
      };
      maxima.of_columns(keys, step, padded, own_.panels.get(0), n * wide, count * wide, wide, starts,
                        rank + n * rank_step + t, rank_step, fetch_few);
    }
  }

  // Ranks blocks of keys by the rows of a cut block, each for itself.
  int64_t propose_one_by_one(const Rows<const T>& low, const Rows<const T>& high, int64_t row,
                             int64_t rows, int64_t start, int64_t end) {
    const int64_t last = choice_.causal ? start : blocks_;
    float* rank = mine_.rank.get(blocks_);
    std::fill(rank, rank + last, kHidden);
    if (heads_ * rows <= kFewRows) {
      rank_few(low, high, row, rows, start, end, last, rank);
      return take(rank, start, end, last);
    }
    for_rows(rows, [&](int64_t first_row, int64_t some, int64_t columns) {
      F* up = alone_.queries.get(2 * dim_ * columns);
      F* down = up + dim_ * columns;
      F* lines = alone_.lines.get(2 * some * dim_);
      F* others = lines + some * dim_;
      float line[dim_], other[dim_];
      for (int64_t c = 0; c < some; ++c) {
        const int64_t at = first_row + c;
        bound_factors(q_[at / rows].row(row + at % rows), dim_, choice_.scale, choice_.key_radius,
                      line, other);
        convert(lines + c * dim_, line, dim_);
        convert(others + c * dim_, other, dim_);
      }
      pack_transposed<F>(lines, dim_, some, dim_, up, columns);
      pack_transposed<F>(others, dim_, some, dim_, down, columns);
      clear_columns<F>(up, dim_, columns, some, columns);
      clear_columns<F>(down, dim_, columns, some, columns);
      float* scores = alone_.scores.get((blocks_ + kKeys) * columns);
      alone_.columns.begin(some, columns);
      const int64_t stretches[2][2] = {{0, start}, {end, last}};
      for (const auto& stretch : stretches) {
        for (int64_t j = stretch[0]; j < stretch[1]; j += kKeys) {
          const int64_t tall = std::min(kKeys, stretch[1] - j);
          int64_t step;
          float* part = scores + j * columns;
          // Always as many rows; the scores of those that are not there are written over or unread.
          const F* box = boxes_of(high, j, tall, alone_.highest, &step);
          multiply<F>(kKeys, columns, dim_, box, step, up, columns, part, columns);
          box = boxes_of(low, j, tall, alone_.lowest, &step);
          multiply<F>(kKeys, columns, dim_, box, step, down, columns, part, columns, true);
          alone_.columns.template add<kCoarse>(part, columns, tall, 1.0f, 0, columns);
        }
      }
      alone_.columns.finish();
      for (const auto& stretch : stretches) {
        alone_.columns.raise(scores + stretch[0] * columns, stretch[1] - stretch[0], 1.0f,
                            rank + stretch[0], 0, columns);
      }
    });
    return take(rank, start, end, last);
  }

  // Ranks of blocks of keys outside [start, end) by few rows, whose scores are kept.
  void rank_few(const Rows<const T>& low, const Rows<const T>& high, int64_t row, int64_t rows,
                int64_t start, int64_t end, int64_t last, float* rank) {
    const int64_t all = heads_ * rows, step = round_up(last, kLanes);
    float* lines = alone_.bounds.get(2 * all * q_dim_);
    float* others = lines + all * q_dim_;
    for (int64_t r = 0; r < all; ++r) {
      bound_factors(q_[r / rows].row(row + r % rows), q_dim_, choice_.scale, choice_.key_radius,
                    lines + r * q_dim_, others + r * q_dim_);
    }
    float *scores = alone_.scores.get(all * step), *sums = alone_.sums.get(all);
    alone_.rows.begin(all);
    const int64_t stretches[2][2] = {{0, start}, {std::min(end, last), last}};
    for (const auto& stretch : stretches) {
      const int64_t first = stretch[0], count = stretch[1] - first;
      for (int64_t j = 0; j < count; j += kStretch) {
        const int64_t at = first + j, some = std::min(kStretch, count - j);
        const auto find = [&](int64_t i, int part) { return (part == 0 ? high : low).row(at + i); };
        float* part = alone_.part.get(all * kStretch);
        score_keys<T, 2>(find, {lines, others}, some, all, q_dim_, part, kStretch);
        for (int64_t r = 0; r < all; ++r) {
          std::copy_n(part + r * kStretch, some, scores + r * step + at);
          alone_.rows.template add<kCoarse>(r, part + r * kStretch, some);
        }
      }
    }
    for (int64_t r = 0; r < all; ++r) {
      sums[r] = alone_.rows.lse(r);
    }
    for (const auto& stretch : stretches) {
      raise(rank, scores, step, sums, all, stretch[0], stretch[1]);
    }
  }

  // Some of the rows of all heads at a time: first, how many, columns.
  template <typename Call>
  void for_rows(int64_t rows, Call&& call) const {
    for (int64_t first = 0; first < heads_ * rows; first += kColumns) {
      const int64_t some = std::min(kColumns, heads_ * rows - first);
      call(first, some, round_up(some, kLanes));
    }
  }

  // `kKeys` rows, of which `count` are there.
  const F* boxes_of(const Rows<const T>& x, int64_t first, int64_t count, Buffer<F>& buffer,
                    int64_t* step) const {
    if (count == kKeys) {
      return factors<T, F>(x, first, count, dim_, buffer, step);
    }
    F* copy = buffer.get(kKeys * dim_);
    for (int64_t i = 0; i < count; ++i) {
      convert(copy + i * dim_, x.row(first + i), dim_);
    }
    std::memset(static_cast<void*>(copy + count * dim_), 0, (kKeys - count) * dim_ * sizeof(F));
    *step = dim_;
    return copy;
  }

  Alone<F>& alone_;
};

}  // namespace

void choose_by_centroids(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                         const at::Tensor& edges, at::Tensor tokens, at::IntArrayRef places,
                         const Choice& choice, int64_t rows, int64_t far, bool narrow,
                         const Bytes& bytes) {
  by_ranked_types(q.scalar_type(), narrow, [&](auto in, auto factor) {
    using T = decltype(in);
    using F = decltype(factor);
    for_each_place(places, 6, [&](at::IntArrayRef at) {
      const int64_t end = at[2] + at[3];
      for (int64_t first = at[2], next; first < end; first = next) {
        const int32_t level = bytes.level(at[0], at[1], first);
        next = first + 1;
        while (next < end && bytes.level(at[0], at[1], next) == level) {
          ++next;
        }
        const int64_t row = at[4] + (first - at[2]) * at[5];
        if (level == kNoBytes) {
          ByColumns<T, F>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
              .run_centroids(first, next - first, row, at[5], rows, far);
        } else {
          ByColumns<T, int8_t, int8_t>(q, bytes.keys, band_lse, edges, tokens, at[0], at[1], choice,
                                       step_at(level))
              .run_centroids(first, next - first, row, at[5], rows, far);
        }
      }
    });
  });
}

void choose_for_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& low, const at::Tensor& high, const at::Tensor& edges,
                    at::Tensor tokens, at::IntArrayRef places, const Choice& choice, bool narrow) {
  by_ranked_types(q.scalar_type(), narrow, [&](auto in, auto factor) {
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      ByColumns<decltype(in), decltype(factor)>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run_cut(low, high, at[0], at[1], at[2], at[3], at[4]);
    });
  });
}

}  // namespace longswift
