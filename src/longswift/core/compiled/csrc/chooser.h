// What all ways to propose keys share: which are candidates, and the exact choice among proposals.
#pragma once

#include <vector>

#include "best.h"
#include "bytes.h"
#include "column_maxima.h"
#include "columns.h"
#include "common.h"
#include "few_rows.h"
#include "kernels.h"

namespace longswift {

// One head of one batch row: queries of type `T`, and keys of type `K`, which are multiplied as `F`.
template <typename T, typename F, typename K = T>
class Chooser {
 protected:
  static constexpr bool kCoarse = !std::is_same_v<F, float>;
  // Keys of a tile.
  static constexpr int64_t kKeys = 64;
  using Maxima = ColumnMaxima<F>;
  using Sum = typename Maxima::Sum;

  // `key_unit` times its number is a channel of a key.
  Chooser(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
          const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
          const Choice& choice, float key_unit = 1.0f)
      : choice_(choice),
        q_dim_(q.size(3)),
        dim_(k.size(3)),
        q_len_(q.size(2)),
        k_len_(k.size(2)),
        heads_(q.size(1) / k.size(1)),
        k_(rows_of<const K>(k, batch, head)),
        tokens_(tokens.data_ptr<int32_t>() + batch * tokens.stride(0) + head * tokens.stride(1)),
        mine_(of_thread<Space>()),
        key_unit_(key_unit),
        edges_(edges.data_ptr<int64_t>() + head * edges.stride(0)) {
    const int64_t whole = k_len_ / choice.key_block;
    blocks_ = choice.causal ? whole : (k_len_ + choice.key_block - 1) / choice.key_block;
    for (int64_t g = 0; g < heads_; ++g) {
      q_.push_back(rows_of<const T>(q, batch, head * heads_ + g));
      lse_.push_back(band_lse.data_ptr<float>() + batch * band_lse.stride(0) +
                     (head * heads_ + g) * band_lse.stride(1));
    }
  }

  // Blocks of keys [0, before) and [after, blocks_) are candidates.
  int64_t before(int64_t block) const { return edges_[2 * block] / choice_.key_block; }
  int64_t after(int64_t block) const {
    if (choice_.causal) {
      return blocks_;
    }
    return std::min(blocks_, (edges_[2 * block + 1] + choice_.key_block - 1) / choice_.key_block);
  }
  int64_t reach(int64_t block) const {
    return choice_.causal ? std::min(before(block), blocks_) : blocks_;
  }

  // Calls with the stretches of blocks of keys that are candidates: first, end.
  template <typename Call>
  void for_candidates(int64_t block, Call&& call) const {
    const int64_t start = std::min(before(block), blocks_);
    call(int64_t{0}, start);
    if (after(block) < blocks_) {
      call(after(block), blocks_);
    }
  }

  // Writes the candidates, ascending, to `blocks`: those with sinks, then those of highest rank.
  int64_t take(float* rank, int64_t start, int64_t end, int64_t last) {
    int32_t* found = mine_.blocks.get(choice_.sink_blocks + choice_.proposed);
    int64_t count = 0;
    for (int64_t j = 0; j < std::min(choice_.sink_blocks, last); ++j) {
      if (j < start || j >= end) {
        found[count++] = static_cast<int32_t>(j);
      }
      rank[j] = kHidden;
    }
    return count + mine_.order.find(rank, last, choice_.proposed, found + count);
  }

  // Writes every candidate of a block of queries, ascending.
  int64_t take_all(int64_t block) {
    int32_t* found = mine_.blocks.get(choice_.sink_blocks + choice_.proposed);
    int64_t count = 0;
    for_candidates(block, [&](int64_t first, int64_t end) {
      for (int64_t j = first; j < end; ++j) {
        found[count++] = static_cast<int32_t>(j);
      }
    });
    return count;
  }

  int64_t candidates(int64_t block) const {
    return std::min(before(block), blocks_) + blocks_ - after(block);
  }

  // The best tokens of the proposed blocks, by how little a row's score of them is below the sum of its
  // band and the best of every 16 of them.
  void choose(int64_t proposed, int64_t row, int64_t rows, int32_t* chosen) {
    if constexpr (std::is_same_v<T, K>) {
      if (heads_ * rows <= kFewRows) {
        choose_for_few(proposed, row, rows, chosen);
        return;
      }
    }
    const int64_t count = list_tokens(proposed), tall = round_up(count, Maxima::kRows);
    const int32_t* tokens = mine_.tokens.get(0);
    const int64_t all = heads_ * rows, wide = Maxima::columns_for(all);
    float* lines = mine_.lines.get(all * q_dim_);
    mine_.columns.begin(all, wide);
    for (int64_t g = 0; g < heads_; ++g) {
      for (int64_t i = 0; i < rows; ++i) {
        convert(lines + (g * rows + i) * q_dim_, q_[g].row(row + i), q_dim_);
      }
      mine_.columns.start_with(lse_[g] + row, g * rows, rows);
    }
    F* queries = mine_.rows.get(all * dim_);
    const float unit = factors_of_rows(lines, all, queries);
    const int64_t tiles = tall / Maxima::kRows;
    float* best = mine_.maxima.get(tiles * wide);
    F* panels = mine_.panels.get(round_up(wide, Maxima::kPanel) * dim_);
    pack(queries, all, panels, 0, wide);
    F* keys = mine_.keys.get(tall * dim_);
    float* rank = mine_.exact.get(tall);
    const Maxima maxima(dim_);
    int64_t fetched = 0;
    for (int64_t t = 0; t < tall; t += kKeys) {
      const int64_t some = std::min(kKeys, tall - t);
      for (int64_t i = t; i < t + some; ++i) {
        convert(keys + i * dim_, k_.row(tokens[std::min(i, count - 1)]), dim_);
      }
      fetched = std::max(fetched, std::min(t + some, count));
      const int64_t limit = std::min(count, t + 2 * kKeys);
      // The next keys are fetched a few at a time: all at once they would wait for each other.
      const auto fetch_few = [&]() __attribute__((always_inline)) {
        for (int64_t few = 0; few < kFew && fetched < limit; ++few) {
          fetch(k_, tokens[fetched++], 1, dim_);
        }
      };
      float* of_tiles = best + t / Maxima::kRows * wide;
      maxima.of_rows(keys + t * dim_, dim_, some, panels, 0, wide, of_tiles, wide, fetch_few);
      mine_.columns.template add<kCoarse>(of_tiles, wide, some / Maxima::kRows, unit, 0, wide);
    }
    mine_.columns.finish();
    Sum* starts = mine_.starts.get(wide);
    mine_.columns.starts(unit, 0, wide, starts);
    const int64_t sinks = std::lower_bound(tokens, tokens + count, choice_.sinks) - tokens;
    const auto rank_tiles = [&](const int32_t* some, int64_t found) {
      maxima.of_columns(keys, dim_, found * Maxima::kRows, panels, 0, wide, wide, starts, rank, 0,
                        [] {}, some);
      std::fill(rank, rank + sinks, kHidden);
      return mine_.order.find(rank, count, choice_.budget, mine_.best.get(choice_.budget));
    };
    std::fill(rank, rank + tall, kHidden);
    const int64_t taken = best_of_tiles(best, tiles, wide, starts, rank, rank_tiles);
    const int32_t* chosen_of = mine_.best.get(0);
    for (int64_t i = 0; i < taken; ++i) {
      chosen[i] = tokens[chosen_of[i]];
    }
  }

  // The same for few rows: scores are kept, as they fit a near cache, and not rounded.
  void choose_for_few(int64_t proposed, int64_t row, int64_t rows, int32_t* chosen) {
    const int64_t count = list_tokens(proposed), tall = round_up(count, Maxima::kRows);
    const int64_t all = heads_ * rows;
    const int32_t* tokens = mine_.tokens.get(0);
    float *lines = mine_.lines.get(all * q_dim_), *scores = mine_.maxima.get(all * tall);
    for (int64_t r = 0; r < all; ++r) {
      scaled_line(lines + r * q_dim_, q_[r / rows].row(row + r % rows), q_dim_, choice_.scale);
    }
    const auto find = [&](int64_t i, int) { return k_.row(tokens[i]); };
    score_keys<T, 1>(find, {lines}, count, all, q_dim_, scores, tall);
    float* sums = mine_.floats.get(all);
    for (int64_t r = 0; r < all; ++r) {
      std::fill(scores + r * tall + count, scores + (r + 1) * tall, kHidden);
      sums[r] = log_sum(scores + r * tall, tall, lse_[r / rows][row + r % rows]);
    }
    float* rank = mine_.exact.get(tall);
    std::fill(rank, rank + tall, kHidden);
    raise(rank, scores, tall, sums, all, 0, count);
    std::fill(rank, std::lower_bound(tokens, tokens + count, choice_.sinks) - tokens + rank, kHidden);
    int32_t* best = mine_.best.get(choice_.budget);
    const int64_t taken = mine_.order.find(rank, count, choice_.budget, best);
    for (int64_t i = 0; i < taken; ++i) {
      chosen[i] = tokens[best[i]];
    }
  }

  // Logarithm of the sum of what a band holds and the best of every 16 of `n` scores, natural.
  static float log_sum(const float* scores, int64_t n, float band) {
    const float top = std::max(max_over(scores, n), band);
    if (top == kHidden) {
      return 0.0f;
    }
    const Vec shift(top);
    Vec sum(0.0f);
    float best[kLanes];
    int64_t found = 0;
    const auto add = [&] {
      std::fill(best + found, best + kLanes, kHidden);
      sum += quick_exp2((Vec::loadu(best) - shift) * Vec(kLog2e));
      found = 0;
    };
    for (int64_t i = 0; i < n; i += Maxima::kRows) {
      Vec most = Vec::loadu(scores + i);
      for (int64_t l = kLanes; l < Maxima::kRows; l += kLanes) {
        most = larger(most, Vec::loadu(scores + i + l));
      }
      best[found++] = max_of(most);
      if (found == kLanes) {
        add();
      }
    }
    if (found > 0) {
      add();
    }
    return top + std::log(sum_of(sum) + std::exp(band - top));
  }

  // Raises the ranks of [from, to) to the largest log-probability in any of some rows of scores, `step`
  // apart, whose sums are given.
  static void raise(float* rank, const float* scores, int64_t step, const float* sums, int64_t rows,
                    int64_t from, int64_t to) {
    int64_t i = from;
    for (; i + kLanes <= to; i += kLanes) {
      Vec best(kHidden);
      for (int64_t r = 0; r < rows; ++r) {
        best = larger(best, Vec::loadu(scores + r * step + i) - Vec(sums[r]));
      }
      best.store(rank + i);
    }
    for (; i < to; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        rank[i] = std::max(rank[i], scores[r * step + i] - sums[r]);
      }
    }
  }

  // Ranks the tiles that promise most, then those that may still hold one of the best keys, by the
  // largest products `best [tiles, wide]` of each; `rank_tiles` returns how many of the best there are.
  template <typename Rank>
  int64_t best_of_tiles(const float* best, int64_t tiles, int64_t wide, const Sum* starts,
                        const float* rank, Rank&& rank_tiles) {
    float *tops = mine_.tops.get(tiles), *start = mine_.floats.get(wide);
    int32_t* some = mine_.some.get(tiles);
    float farthest = 0.0f;
    for (int64_t c = 0; c < wide; ++c) {
      start[c] = static_cast<float>(starts[c]);
      // Those of columns that are none are farther than any.
      farthest = std::max(farthest, start[c] > kNone ? std::abs(start[c]) : 0.0f);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      Vec top(kHidden);
      for (int64_t c = 0; c < wide; c += kLanes) {
        top = larger(top, Vec::loadu(best + t * wide + c) + Vec::loadu(start + c));
      }
      tops[t] = max_of(top);
    }
    const int64_t likely = mine_.order.find(tops, tiles, std::max<int64_t>(choice_.budget / 2, 1), some);
    const int64_t taken = rank_tiles(some, likely);
    float least = kHidden;
    if (taken == choice_.budget) {
      const int32_t* chosen = mine_.best.get(0);
      least = -kHidden;
      for (int64_t i = 0; i < taken; ++i) {
        least = std::min(least, rank[chosen[i]]);
      }
      // Sums in another order.
      least -= 1e-5f * (farthest + std::abs(least));
    }
    for (int64_t i = 0; i < likely; ++i) {
      tops[some[i]] = std::numeric_limits<float>::quiet_NaN();
    }
    int64_t more = 0;
    for (int32_t t = 0; t < tiles; ++t) {
      some[more] = t;
      more += tops[t] >= least;
    }
    return more > 0 ? rank_tiles(some, more) : taken;
  }

  // Writes `count` rows as factors; returns what their products with keys are to be multiplied by,
  // which is positive: maxima of products are those of scores whatever the sign of the scale.
  float factors_of_rows(float* rows, int64_t count, F* out) const {
    if (choice_.scale <= 0.0f) {
      const float sign = choice_.scale < 0.0f ? -1.0f : 0.0f;
      for (int64_t i = 0; i < count * q_dim_; ++i) {
        rows[i] *= sign;
      }
    }
    const float magnitude = choice_.scale == 0.0f ? 1.0f : std::abs(choice_.scale);
    if constexpr (std::is_same_v<F, int8_t>) {
      const float peak = peak_of(rows, count * q_dim_);
      const float step = std::max(peak / kMostSteps, kLeastStep);
      for (int64_t i = 0; i < count; ++i) {
        to_bytes(rows + i * q_dim_, q_dim_, 1.0f / step, out + i * dim_, dim_);
      }
      return magnitude * step * key_unit_;
    } else {
      convert(out, rows, count * q_dim_);
      return magnitude;
    }
  }

  // `count` rows as columns [first, end) of panels, those that are not there as zeros.
  void pack(const F* rows, int64_t count, F* panels, int64_t first, int64_t end) const {
    constexpr int64_t wide = Maxima::kPanel;
    for (int64_t c = first; c < end;) {
      const int64_t inside = c % wide, some = std::min(wide - inside, end - c);
      const int64_t here = std::clamp<int64_t>(first + count - c, 0, some);
      F* panel = panels + (c - inside) * dim_;
      F* columns = panel + inside * static_cast<int64_t>(sizeof(float) / sizeof(F));
      pack_transposed<F>(rows + (c - first) * dim_, dim_, here, dim_, columns, wide);
      clear_columns<F>(panel, dim_, wide, inside + here, inside + some);
      c += some;
    }
  }

  // Keys [first, first + count), as many as they are filled up to by the last; `padded` of them.
  const F* tile_of(int64_t first, int64_t count, F* tile, int64_t* step, int64_t* padded) const {
    *padded = round_up(count, Maxima::kRows);
    if constexpr (std::is_same_v<K, F>) {
      if (count == *padded) {
        *step = k_.step;
        return k_.row(first);
      }
    }
    for (int64_t i = 0; i < *padded; ++i) {
      convert(tile + i * dim_, k_.row(first + std::min(i, count - 1)), dim_);
    }
    *step = dim_;
    return tile;
  }

 private:
  // Keys fetched while two tiles of products are taken.
  static constexpr int64_t kFew = 4;
  // What columns that are none start from lies below.
  static constexpr float kNone = -(1 << 29);
  // Of rows that are nearly nothing.
  static constexpr float kLeastStep = 1e-20f;

  struct Space {
    Buffer<F> rows, panels, keys;
    Buffer<float> lines, rank, exact, maxima, tops, floats;
    Buffer<Sum> starts;
    Buffer<int32_t> blocks, tokens, best, some;
    Best order;
    Columns columns;
  };

  // Tokens of the proposed blocks; the last block of the sequence is perhaps cut.
  int64_t list_tokens(int64_t proposed) {
    const int32_t* blocks = mine_.blocks.get(0);
    int32_t* tokens = mine_.tokens.get(proposed * choice_.key_block);
    if (choice_.key_block == 1) {
      std::copy(blocks, blocks + proposed, tokens);
      return proposed;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < proposed; ++i) {
      const int64_t first = blocks[i] * choice_.key_block;
      const int64_t end = std::min(first + choice_.key_block, k_len_);
      for (int64_t token = first; token < end; ++token) {
        tokens[count++] = static_cast<int32_t>(token);
      }
    }
    return count;
  }

 protected:
  const Choice& choice_;
  // Channels of queries, and of factors: perhaps more, as tiles are.
  const int64_t q_dim_, dim_, q_len_, k_len_, heads_;
  const Rows<const K> k_;
  int32_t* tokens_;
  Space& mine_;
  int64_t blocks_;
  std::vector<Rows<const T>> q_;

 private:
  const float key_unit_;
  const int64_t* edges_;
  std::vector<const float*> lse_;
};

}  // namespace longswift
