// Key tokens by bounds of boxes, all of them or those that a tree leads to.
#include "chooser.h"
#include "common.h"
#include "descent.h"
#include "kernels.h"
#include "lines.h"

namespace longswift {

namespace {

// Scores of boxes a thread holds at once.
constexpr int64_t kScores = 1 << 21;
constexpr int64_t kMostRows = 64;
// Boxes whose scores are summed up while they are in the nearest caches.
constexpr int64_t kStretch = 512;

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

template <typename F>
struct Space {
  Buffer<F> groups;
  Buffer<float> bounds;
  Lines lines;
  Descent<F> descent;
};

template <typename T, typename F>
class ByBoxes : Chooser<T, F> {
  using Base = Chooser<T, F>;

 public:
  ByBoxes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
          const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
          const Choice& choice)
      : Base(q, k, band_lse, edges, tokens, batch, head, choice),
        groups_of_block_((choice.block + choice.row_group - 1) / choice.row_group),
        rows_of_block_(heads_ * groups_of_block_),
        own_(of_thread<Space<F>>()) {}

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

 private:
  using Base::after;
  using Base::before;
  using Base::blocks_;
  using Base::choice_;
  using Base::choose;
  using Base::dim_;
  using Base::for_candidates;
  using Base::heads_;
  using Base::kCoarse;
  using Base::mine_;
  using Base::q_;
  using Base::raise;
  using Base::reach;
  using Base::take;
  using Base::tokens_;

  // Groups of the rows of some blocks, `[count * rows_of_block_, inner]`.
  const F* describe(int64_t count, int64_t row, int64_t inner) {
    F* groups = own_.groups.get(count * rows_of_block_ * inner);
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
    float* bounds = own_.bounds.get(rows * step);
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
      found += own_.descent.find(tree, groups + before_row * tree.inner, rows_of_block_,
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
    float* bounds = own_.bounds.get(rows * step);
    own_.lines.begin(rows);
    for (int64_t column = 0; column < width; column += kStretch) {
      const int64_t stretch_end = std::min(width, column + kStretch);
      for (int64_t part = column; part < stretch_end; part += width_) {
        multiply<F>(rows, width_, inner, groups, inner, panels_ + part * inner, width_,
                    bounds + part, step);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t block = first + r / rows_of_block_;
        const float* of_row = bounds + r * step;
        for_candidates(block, [&](int64_t start, int64_t end) {
          start = std::max(start, column), end = std::min(end, stretch_end);
          own_.lines.template add<kCoarse>(r, of_row + start, end - start);
        });
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t found = propose(first + n, bounds + n * rows_of_block_ * step, step,
                                    n * rows_of_block_);
      if (found > 0) {
        choose(found, row + n * choice_.block, choice_.block,
               tokens_ + (first + n) * choice_.budget);
      }
    }
  }

  // Ranks blocks of keys by groups of rows, the first of which is line `line`.
  int64_t propose(int64_t block, const float* bounds, int64_t step, int64_t line) {
    const int64_t start = std::min(before(block), blocks_);
    const int64_t last = choice_.causal ? start : blocks_;
    float* rank = mine_.rank.get(blocks_);
    std::fill(rank, rank + last, kHidden);
    float lse[rows_of_block_];
    for (int64_t r = 0; r < rows_of_block_; ++r) {
      lse[r] = own_.lines.lse(line + r);
    }
    for_candidates(block, [&](int64_t from, int64_t to) {
      raise(rank, bounds, step, lse, rows_of_block_, from, to);
    });
    return take(rank, start, after(block), last);
  }

  const int64_t groups_of_block_, rows_of_block_;
  const F* panels_ = nullptr;
  int64_t width_ = 0;
  Space<F>& own_;
};

}  // namespace

void choose_by_bounds(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                      const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                      at::IntArrayRef places, const Choice& choice) {
  by_ranked_types(q.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    using F = decltype(factor);
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      const F* panels = boxes.data_ptr<F>() + (at[0] * k.size(1) + at[1]) * boxes.stride(0);
      ByBoxes<decltype(in), F>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run(panels, boxes.size(3), at[2], at[3], at[4]);
    });
  });
}

void choose_by_tree(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& top, at::TensorList levels, const at::Tensor& edges,
                    at::Tensor tokens, at::IntArrayRef places, const Choice& choice,
                    int64_t opened) {
  by_ranked_types(q.scalar_type(), top.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    using F = decltype(factor);
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      const int64_t problem = at[0] * k.size(1) + at[1];
      Tree<F> tree{
          top.data_ptr<F>() + problem * top.stride(0), {}, top.size(2), top.size(3),
          levels[0].size(3), opened,
      };
      for (const at::Tensor& level : levels) {
        tree.panels.push_back(level.data_ptr<F>() + problem * level.stride(0));
      }
      ByBoxes<decltype(in), F>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run(tree, at[2], at[3], at[4]);
    });
  });
}

}  // namespace longswift
