// What all ways to propose keys share: which are candidates, and the exact choice among proposals.
#pragma once

#include <vector>

#include "best.h"
#include "columns.h"
#include "common.h"
#include "kernels.h"
#include "tile_products.h"

namespace longswift {

// One head of one batch row.
template <typename T, typename F>
class Chooser {
 protected:
  static constexpr bool kCoarse = !std::is_same_v<F, float>;
  // Keys of a tile of scores, and rows, its columns, at most.
  static constexpr int64_t kKeys = 64;
  static constexpr int64_t kColumns = 128;

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
        mine_(space()),
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

  // Some of the rows of all heads at a time, at most `most`: first, how many, columns.
  template <typename Call>
  void for_rows(int64_t rows, int64_t most, Call&& call) const {
    for (int64_t first = 0; first < heads_ * rows; first += most) {
      const int64_t some = std::min(most, heads_ * rows - first);
      call(first, some, round_up(some, kLanes));
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

  // The best tokens of the proposed blocks, by their largest probability in any row.
  void choose(int64_t proposed, int64_t row, int64_t rows, int32_t* chosen) {
    const int32_t* blocks = mine_.blocks.get(0);
    int32_t* tokens = mine_.tokens.get(proposed * choice_.key_block);
    int64_t count = 0;
    for (int64_t i = 0; i < proposed; ++i) {
      for (int64_t inside = 0; inside < choice_.key_block; ++inside) {
        const int64_t token = blocks[i] * choice_.key_block + inside;
        if (token < k_len_) {
          tokens[count++] = static_cast<int32_t>(token);
        }
      }
    }
    const int64_t tall = round_up(count, 32);
    F* keys = mine_.keys.get(tall * dim_);
    gather(tokens, count, keys);
    std::memset(static_cast<void*>(keys + count * dim_), 0, (tall - count) * dim_ * sizeof(F));
    float* rank = mine_.exact.get(count);
    std::fill(rank, rank + count, kHidden);
    // As many rows at a time as leave scores in the cache of a core.
    const int64_t most = std::clamp<int64_t>(kExact / tall / 32 * 32, 32, kColumns);
    for_rows(rows, most, [&](int64_t first_row, int64_t some, int64_t columns) {
      float* scores = mine_.scores.get(tall * columns);
      F* packed = mine_.queries.get(dim_ * columns);
      mine_.columns.begin(some, columns);
      for (int64_t c = 0; c < some;) {
        const int64_t head = (first_row + c) / rows, first = (first_row + c) % rows;
        const int64_t count_here = std::min(rows - first, some - c);
        int64_t step;
        const F* queries =
            factors<T, F>(q_[head], row + first, count_here, dim_, mine_.wide, &step);
        pack_transposed<F>(queries, step, count_here, dim_, packed_at(packed, c), columns);
        mine_.columns.start_with(lse_[head] + row + first, c, count_here);
        c += count_here;
      }
      clear_columns<F>(packed, dim_, columns, some, columns);
      const TileProducts<F> products(dim_);
      for (int64_t t = 0; t < tall; t += kKeys) {
        const int64_t more = std::min(kKeys, tall - t);
        float* part = scores + t * columns;
        products.multiply(keys + t * dim_, dim_, more, packed, columns, part);
        mine_.columns.template add<kCoarse>(part, std::min(more, count - t), choice_.scale);
      }
      mine_.columns.finish();
      mine_.columns.raise(scores, count, choice_.scale, rank, 0, columns);
    });
    for (int64_t t = 0; t < count && tokens[t] < choice_.sinks; ++t) {
      rank[t] = kHidden;
    }
    int32_t* best = mine_.best.get(choice_.budget);
    const int64_t taken = mine_.order.find(rank, count, choice_.budget, best);
    for (int64_t i = 0; i < taken; ++i) {
      chosen[i] = tokens[best[i]];
    }
  }

  // A column takes 32 bits: one number, or two of 16.
  static F* packed_at(F* packed, int64_t column) {
    return packed + column * static_cast<int64_t>(sizeof(float) / sizeof(F));
  }

 private:
  // Exact scores held at once.
  static constexpr int64_t kExact = 5 << 16;

  struct Space {
    Buffer<F> queries, keys, wide;
    Buffer<float> rank, exact, scores;
    Buffer<int32_t> blocks, tokens, best;
    Best order;
    Columns columns;
  };

  static Space& space() {
    static thread_local Space mine;
    return mine;
  }

  // Tokens come in whole blocks, the last one of the sequence perhaps cut.
  void gather(const int32_t* tokens, int64_t count, F* keys) {
    if constexpr (std::is_same_v<T, F>) {
      if (k_.step == dim_ && count % choice_.key_block == 0) {
        for (int64_t t = 0; t < count; t += choice_.key_block) {
          std::memcpy(static_cast<void*>(keys + t * dim_), k_.row(tokens[t]),
                      choice_.key_block * dim_ * sizeof(F));
        }
        return;
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      convert(keys + t * dim_, k_.row(tokens[t]), dim_);
    }
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
