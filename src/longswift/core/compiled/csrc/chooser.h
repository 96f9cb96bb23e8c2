// What all ways to propose keys share: which are candidates, and the exact choice among proposals.
#pragma once

#include <vector>

#include "best.h"
#include "column_maxima.h"
#include "columns.h"
#include "common.h"
#include "kernels.h"

namespace longswift {

// One head of one batch row.
template <typename T, typename F>
class Chooser {
 protected:
  static constexpr bool kCoarse = !std::is_same_v<F, float>;
  // Keys of a tile.
  static constexpr int64_t kKeys = 64;

  Chooser(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
          const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
          const Choice& choice)
      : choice_(choice),
        dim_(q.size(3)),
        q_len_(q.size(2)),
        k_len_(k.size(2)),
        heads_(q.size(1) / k.size(1)),
        k_(rows_of<const T>(k, batch, head)),
        tokens_(tokens.data_ptr<int32_t>() + batch * tokens.stride(0) + head * tokens.stride(1)),
        mine_(of_thread<Space>()),
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

  // The best tokens of the proposed blocks, by how little a row's score of them is below the sum of its
  // band and the best of every 16 of them.
  void choose(int64_t proposed, int64_t row, int64_t rows, int32_t* chosen) {
    const int64_t count = list_tokens(proposed), tall = round_up(count, ColumnMaxima<F>::kRows);
    const int32_t* tokens = mine_.tokens.get(0);
    const int64_t all = heads_ * rows, wide = ColumnMaxima<F>::columns_for(all);
    F* queries = mine_.rows.get(all * dim_);
    mine_.columns.begin(all, wide);
    for (int64_t g = 0; g < heads_; ++g) {
      for (int64_t i = 0; i < rows; ++i) {
        convert(queries + (g * rows + i) * dim_, q_[g].row(row + i), dim_);
      }
      mine_.columns.start_with(lse_[g] + row, g * rows, rows);
    }
    turn(queries, all);
    float* best = mine_.maxima.get(kKeys / ColumnMaxima<F>::kRows * wide);
    F* panels = mine_.panels.get(round_up(wide, ColumnMaxima<F>::kPanel) * dim_);
    pack(queries, all, panels, 0, wide);
    F* keys = mine_.keys.get(tall * dim_);
    float* rank = mine_.exact.get(tall);
    {
      const ColumnMaxima<F> maxima(dim_);
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
        maxima.of_rows(keys + t * dim_, dim_, some, panels, 0, wide, best, wide, fetch_few);
        mine_.columns.template add<kCoarse>(best, wide, some / ColumnMaxima<F>::kRows, magnitude(), 0,
                                            wide);
      }
      mine_.columns.finish();
      maxima.of_columns(keys, dim_, tall, panels, 0, wide, wide, mine_.columns.sums(magnitude()), rank,
                        0, [] {});
    }
    for (int64_t t = 0; t < count && tokens[t] < choice_.sinks; ++t) {
      rank[t] = kHidden;
    }
    int32_t* chosen_of = mine_.best.get(choice_.budget);
    const int64_t taken = mine_.order.find(rank, count, choice_.budget, chosen_of);
    for (int64_t i = 0; i < taken; ++i) {
      chosen[i] = tokens[chosen_of[i]];
    }
  }

  // Products with rows that were turned, times the magnitude, are scores: maxima of products are
  // those of scores whatever the sign of the scale.
  float magnitude() const { return choice_.scale == 0.0f ? 1.0f : std::abs(choice_.scale); }
  void turn(F* rows, int64_t count) const {
    if (choice_.scale <= 0.0f) {
      const float sign = choice_.scale < 0.0f ? -1.0f : 0.0f;
      for (int64_t i = 0; i < count * dim_; ++i) {
        rows[i] = F(static_cast<float>(rows[i]) * sign);
      }
    }
  }

  // `count` rows as columns [first, end) of panels, those that are not there as zeros.
  void pack(const F* rows, int64_t count, F* panels, int64_t first, int64_t end) const {
    constexpr int64_t wide = ColumnMaxima<F>::kPanel;
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
    *padded = round_up(count, ColumnMaxima<F>::kRows);
    if constexpr (std::is_same_v<T, F>) {
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

  struct Space {
    Buffer<F> rows, panels, keys;
    Buffer<float> rank, exact, maxima;
    Buffer<int32_t> blocks, tokens, best;
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
  const int64_t dim_, q_len_, k_len_, heads_;
  const Rows<const T> k_;
  int32_t* tokens_;
  Space& mine_;
  int64_t blocks_;
  std::vector<Rows<const T>> q_;

 private:
  const int64_t* edges_;
  std::vector<const float*> lse_;
};

}  // namespace longswift
