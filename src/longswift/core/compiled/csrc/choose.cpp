// Key tokens by bounds: propose blocks of keys for a block of queries, re-rank their tokens exactly.
#include "best.h"
#include "columns.h"
#include "common.h"
#include "descent.h"
#include "kernels.h"

namespace longswift {

namespace {

// Scores of boxes a thread holds at once, and columns of a panel of them.
constexpr int64_t kScores = 1 << 21;
constexpr int64_t kMostRows = 64;
constexpr int64_t kKeys = 64;
constexpr int64_t kColumns = 128;

template <typename F>
struct Space {
  Buffer<F> groups, queries, keys, wide, highest, lowest;
  Buffer<float> bounds, rank, scores;
  Buffer<int32_t> blocks, tokens, best;
  Best order;
  Columns columns;
  Descent<F> descent;
};

template <typename F>
Space<F>& space() {
  static thread_local Space<F> mine;
  return mine;
}

// Boxes around every `size` of `count` rows, as [groups, 3 * dim]: centre, what meets the radius of
// a block, what meets the absolute centre of one. Where they shrink to their centres, [groups,
// 2 * dim]: what meets the maximum of a block, what meets the minimum.
template <typename T, typename F>
void describe_rows(const Rows<const T>& q, int64_t first, int64_t count, int64_t size, int64_t dim,
                   const Choice& choice, F* out) {
  float low[dim], high[dim], line[3 * dim], row[dim];
  for (int64_t start = 0; start < count; start += size) {
    std::fill(low, low + dim, -kHidden);
    std::fill(high, high + dim, kHidden);
    for (int64_t i = start; i < std::min(count, start + size); ++i) {
      convert(row, q.row(first + i), dim);
      for (int64_t d = 0; d < dim; ++d) {
        const float x = row[d] * choice.scale;
        low[d] = std::min(low[d], x);
        high[d] = std::max(high[d], x);
      }
    }
    if (choice.numbers() == 2) {
      for (int64_t d = 0; d < dim; ++d) {
        row[d] = (low[d] + high[d]) / 2;
      }
      bound_factors(row, dim, 1.0f, choice.key_radius, line, line + dim);
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        const float centre = (low[d] + high[d]) / 2;
        const float radius = choice.row_radius * (high[d] - low[d]) / 2;
        line[d] = centre;
        line[dim + d] = choice.key_radius * (std::abs(centre) + radius);
        line[2 * dim + d] = radius;
      }
    }
    convert(out, line, choice.numbers() * dim);
    out += choice.numbers() * dim;
  }
}

// One head of one batch row.
template <typename T, typename F>
class Chooser {
 public:
  Chooser(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
          const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
          const Choice& choice)
      : choice_(choice),
        dim_(q.size(3)),
        k_len_(k.size(2)),
        heads_(q.size(1) / k.size(1)),
        groups_of_block_((choice.block + choice.row_group - 1) / choice.row_group),
        rows_of_block_(heads_ * groups_of_block_),
        k_(rows_of<const T>(k, batch, head)),
        edges_(edges.data_ptr<int64_t>() + head * edges.stride(0)),
        tokens_(tokens.data_ptr<int32_t>() + batch * tokens.stride(0) + head * tokens.stride(1)),
        mine_(space<F>()) {
    const int64_t whole = k_len_ / choice.key_block;
    blocks_ = choice.causal ? whole : (k_len_ + choice.key_block - 1) / choice.key_block;
    for (int64_t g = 0; g < heads_; ++g) {
      q_.push_back(rows_of<const T>(q, batch, head * heads_ + g));
      lse_.push_back(band_lse.data_ptr<float>() + batch * band_lse.stride(0) +
                     (head * heads_ + g) * band_lse.stride(1));
    }
  }

  // Complete blocks [first, first + count) of the queries, the first of which starts at row `row`.
  // Rows are bounded in groups; `boxes [panels, numbers * dim, width]` are those of the keys.
  void run(const F* boxes, int64_t width, int64_t first, int64_t count, int64_t row) {
    panels_ = boxes;
    width_ = width;
    int64_t done = 0;
    while (done < count) {
      int64_t needed = reach(first + done);
      int64_t some = 1;
      while (done + some < count && rows_of_block_ * (some + 1) <= kMostRows) {
        const int64_t wider = std::max(needed, reach(first + done + some));
        if (rows_of_block_ * (some + 1) * row_step(wider) > kScores) {
          break;
        }
        needed = wider;
        ++some;
      }
      if (needed > 0) {
        propose_and_choose(first + done, some, row + done * choice_.block, needed);
      }
      done += some;
    }
  }

  // The same by a tree of boxes.
  void run(const Tree<F>& tree, int64_t first, int64_t count, int64_t row) {
    const int64_t size = tree.size(static_cast<int64_t>(tree.panels.size()));
    int64_t needed = 0;
    for (int64_t n = 0; n < count; ++n) {
      needed = std::max(needed, (reach(first + n) + size - 1) / size);
    }
    const int64_t held = std::min(kMostRows, kScores / row_step(round_up(needed, tree.width)));
    const int64_t most = std::max<int64_t>(1, held / rows_of_block_);
    while (count > 0) {
      const int64_t some = std::min(most, count);
      if (needed > 0) {
        descend_and_choose(tree, first, some, row, needed, size);
      }
      first += some;
      count -= some;
      row += some * choice_.block;
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

  // Groups of the rows of some blocks, `[count * rows_of_block_, inner]`.
  const F* describe(int64_t count, int64_t row, int64_t inner) {
    F* groups = mine_.groups.get(count * rows_of_block_ * inner);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t g = 0; g < heads_; ++g) {
        describe_rows<T, F>(q_[g], row + n * choice_.block, choice_.block, choice_.row_group, dim_,
                            choice_, groups + (n * rows_of_block_ + g * groups_of_block_) * inner);
      }
    }
    return groups;
  }

  void descend_and_choose(const Tree<F>& tree, int64_t first, int64_t count, int64_t row,
                          int64_t needed, int64_t size) {
    const int64_t rows = count * rows_of_block_;
    const int64_t width = round_up(needed, tree.width), step = row_step(width);
    const F* groups = describe(count, row, tree.inner);
    float* bounds = mine_.bounds.get(rows * step);
    for (int64_t column = 0; column < width; column += tree.width) {
      multiply<F>(rows, tree.width, tree.inner, groups, tree.inner, tree.top + column * tree.inner,
                  tree.width, bounds + column, step);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = first + n;
      const int64_t nodes = (reach(block) + size - 1) / size;
      if (nodes == 0) {
        continue;
      }
      const Candidates outside{std::min(before(block), blocks_), after(block), blocks_,
                               choice_.sink_blocks};
      int32_t* blocks = mine_.blocks.get(choice_.sink_blocks + choice_.proposed);
      int64_t found = 0;
      for (int64_t j = 0; j < std::min(choice_.sink_blocks, blocks_); ++j) {
        if (outside.all(j, j + 1)) {
          blocks[found++] = static_cast<int32_t>(j);
        }
      }
      const int64_t before_row = n * rows_of_block_;
      found += mine_.descent.find(tree, groups + before_row * tree.inner, rows_of_block_,
                                  bounds + before_row * step, step, nodes, outside,
                                  choice_.proposed, blocks + found);
      if (found > 0) {
        choose(found, row + n * choice_.block, choice_.block, tokens_ + block * choice_.budget);
      }
    }
  }

  void propose_and_choose(int64_t first, int64_t count, int64_t row, int64_t needed) {
    const int64_t rows = count * rows_of_block_, inner = choice_.numbers() * dim_;
    const int64_t width = round_up(needed, width_), step = row_step(width);
    const F* groups = describe(count, row, inner);
    float* bounds = mine_.bounds.get(rows * step);
    for (int64_t column = 0; column < width; column += width_) {
      multiply<F>(rows, width_, inner, groups, inner, panels_ + column * inner, width_,
                  bounds + column, step);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = first + n;
      const int64_t start = std::min(before(block), blocks_), end = after(block);
      float* of_block = bounds + n * rows_of_block_ * step;
      const int64_t found = propose(of_block, step, start, end);
      if (found > 0) {
        choose(found, row + n * choice_.block, choice_.block, tokens_ + block * choice_.budget);
      }
    }
  }

  // Ranks blocks of keys by the rows of a cut block, each for itself.
  int64_t propose_one_by_one(const Rows<const T>& low, const Rows<const T>& high, int64_t row,
                             int64_t rows, int64_t start, int64_t end) {
    const int64_t last = choice_.causal ? start : blocks_;
    float* rank = mine_.rank.get(blocks_);
    std::fill(rank, rank + last, kHidden);
    for_heads(rows, [&](int64_t first_head, int64_t some, int64_t columns) {
      F* up = mine_.queries.get(2 * dim_ * columns);
      F* down = up + dim_ * columns;
      F* lines = mine_.wide.get(2 * some * rows * dim_);
      F* others = lines + some * rows * dim_;
      float line[dim_], other[dim_];
      for (int64_t c = 0; c < some * rows; ++c) {
        bound_factors(q_[first_head + c / rows].row(row + c % rows), dim_, choice_.scale,
                      choice_.key_radius, line, other);
        convert(lines + c * dim_, line, dim_);
        convert(others + c * dim_, other, dim_);
      }
      pack_transposed<F>(lines, dim_, some * rows, dim_, up, columns);
      pack_transposed<F>(others, dim_, some * rows, dim_, down, columns);
      clear_columns<F>(up, dim_, columns, some * rows);
      clear_columns<F>(down, dim_, columns, some * rows);
      float* scores = mine_.bounds.get((blocks_ + kKeys) * columns);
      mine_.columns.begin(some * rows, columns);
      const int64_t stretches[2][2] = {{0, start}, {end, last}};
      for (const auto& stretch : stretches) {
        for (int64_t j = stretch[0]; j < stretch[1]; j += kKeys) {
          const int64_t tall = std::min(kKeys, stretch[1] - j);
          int64_t step;
          float* part = scores + j * columns;
          // Always as many rows; the scores of those that are not there are written over or unread.
          const F* box = boxes_of(high, j, tall, mine_.highest, &step);
          multiply<F>(kKeys, columns, dim_, box, step, up, columns, part, columns);
          box = boxes_of(low, j, tall, mine_.lowest, &step);
          multiply<F>(kKeys, columns, dim_, box, step, down, columns, part, columns, true);
          mine_.columns.add(part, tall, 1.0f);
        }
      }
      mine_.columns.finish();
      for (const auto& stretch : stretches) {
        mine_.columns.raise(scores + stretch[0] * columns, stretch[1] - stretch[0],
                            rank + stretch[0]);
      }
    });
    return take(start, end, last);
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

  // As many heads at a time as fill the columns of a product: first, how many, columns.
  template <typename Call>
  void for_heads(int64_t rows, Call&& call) const {
    const int64_t most = std::max<int64_t>(1, kColumns / rows);
    for (int64_t g = 0; g < heads_; g += most) {
      const int64_t some = std::min(most, heads_ - g);
      call(g, some, round_up(some * rows, kLanes));
    }
  }

  // Ranks blocks of keys by groups of rows.
  int64_t propose(float* bounds, int64_t step, int64_t start, int64_t end) {
    float* rank = mine_.rank.get(blocks_);
    const int64_t last = choice_.causal ? start : blocks_;
    std::fill(rank, rank + last, kHidden);
    for (int64_t r = 0; r < rows_of_block_; ++r) {
      const float* of_row = bounds + r * step;
      const float top = std::max(max_over(of_row, start), max_over(of_row + end, last - end));
      float sum = sum_of_exponentials(of_row, start, top);
      sum += sum_of_exponentials(of_row + end, last - end, top);
      const float lse = top + std::log(sum);
      raise(rank, of_row, start, lse);
      raise(rank + end, of_row + end, last - end, lse);
    }
    return take(start, end, last);
  }

  // Writes the candidates, ascending, to `blocks`: those with sinks, then those of highest rank.
  int64_t take(int64_t start, int64_t end, int64_t last) {
    float* rank = mine_.rank.get(0);
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

  // rank = max(rank, scores - shift)
  static void raise(float* rank, const float* scores, int64_t n, float shift) {
    int64_t i = 0;
    const Vec by(shift);
    for (; i + kLanes <= n; i += kLanes) {
      at::vec::maximum(Vec::loadu(rank + i), Vec::loadu(scores + i) - by).store(rank + i);
    }
    for (; i < n; ++i) {
      rank[i] = std::max(rank[i], scores[i] - shift);
    }
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
    float* rank = mine_.rank.get(count);
    std::fill(rank, rank + count, kHidden);
    for_heads(rows, [&](int64_t first_head, int64_t some, int64_t columns) {
      float* scores = mine_.scores.get(tall * columns);
      F* packed = mine_.queries.get(dim_ * columns);
      mine_.columns.begin(some * rows, columns);
      for (int64_t g = 0; g < some; ++g) {
        int64_t step;
        const F* queries = factors<T, F>(q_[first_head + g], row, rows, dim_, mine_.wide, &step);
        pack_transposed<F>(queries, step, rows, dim_, packed_at(packed, g * rows), columns);
        mine_.columns.start_with(lse_[first_head + g] + row, g * rows, rows);
      }
      clear_columns<F>(packed, dim_, columns, some * rows);
      for (int64_t t = 0; t < tall; t += kKeys) {
        const int64_t more = std::min(kKeys, tall - t);
        float* part = scores + t * columns;
        multiply<F>(more, columns, dim_, keys + t * dim_, dim_, packed, columns, part, columns);
        mine_.columns.add(part, std::min(more, count - t), choice_.scale);
      }
      mine_.columns.finish();
      mine_.columns.raise(scores, count, rank);
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

  const Choice& choice_;
  const int64_t dim_, k_len_, heads_, groups_of_block_, rows_of_block_;
  const Rows<const T> k_;
  const F* panels_ = nullptr;
  int64_t width_ = 0;
  const int64_t* edges_;
  int32_t* tokens_;
  Space<F>& mine_;
  int64_t blocks_;
  std::vector<Rows<const T>> q_;
  std::vector<const float*> lse_;
};

}  // namespace

void choose_by_bounds(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                      const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                      at::IntArrayRef places, const Choice& choice) {
  by_types(q.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    using F = decltype(factor);
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      const F* panels = boxes.data_ptr<F>() + (at[0] * k.size(1) + at[1]) * boxes.stride(0);
      Chooser<decltype(in), F>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run(panels, boxes.size(3), at[2], at[3], at[4]);
    });
  });
}

void choose_by_tree(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& top, at::TensorList levels, const at::Tensor& edges,
                    at::Tensor tokens, at::IntArrayRef places, const Choice& choice,
                    int64_t opened) {
  by_types(q.scalar_type(), top.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    using F = decltype(factor);
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      const int64_t problem = at[0] * k.size(1) + at[1];
      Tree<F> tree{top.data_ptr<F>() + problem * top.stride(0), {},     top.size(2), top.size(3),
                   levels[0].size(3),                           opened};
      for (const at::Tensor& level : levels) {
        tree.panels.push_back(level.data_ptr<F>() + problem * level.stride(0));
      }
      Chooser<decltype(in), F>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run(tree, at[2], at[3], at[4]);
    });
  });
}

void choose_for_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& low, const at::Tensor& high, const at::Tensor& edges,
                    at::Tensor tokens, at::IntArrayRef places, const Choice& choice, bool narrow) {
  by_types(q.scalar_type(), narrow, [&](auto in, auto factor) {
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      Chooser<decltype(in), decltype(factor)>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run_cut(low, high, at[0], at[1], at[2], at[3], at[4]);
    });
  });
}

}  // namespace longswift
