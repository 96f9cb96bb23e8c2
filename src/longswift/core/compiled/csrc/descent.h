// A tree of boxes around blocks of keys: only the children of the best nodes are bounded.
#pragma once

#include <vector>

#include "best.h"
#include "common.h"
#include "lines.h"

namespace longswift {

// Blocks of keys [0, start) and [end, leaves) are candidates; the first `sinks` are never chosen.
struct Candidates {
  int64_t start, end, leaves, sinks;

  // Of the blocks [first, last), which may go beyond the last one.
  bool all(int64_t first, int64_t last) const {
    return last <= start || (first >= end && first < leaves);
  }
  bool none(int64_t first, int64_t last) const {
    return first >= leaves || (first >= start && std::min(last, leaves) <= end);
  }
};

// A tree of one head, from the level at which it is entered: `top` are the nodes of that, in panels
// `[inner, width]`, and `panels`, for the levels below it from the blocks of keys on, for every node
// of the level above `[inner, branch]` of its children.
template <typename F>
struct Tree {
  const F* top;
  std::vector<const F*> panels;
  int64_t inner, width, branch, opened;

  // Blocks of keys in a node of a level.
  int64_t size(int64_t level) const {
    int64_t blocks = 1;
    for (int64_t i = 0; i < level; ++i) {
      blocks *= branch;
    }
    return blocks;
  }
};

template <typename F>
class Descent {
 public:
  // Writes the best `most` blocks of keys that the tree leads to, ascending; returns how many.
  // `bounds [rows, width]`, a row every `step` numbers, are those of the first nodes of the level at
  // which it is entered, `groups [rows, inner]` what panels are multiplied by.
  int64_t find(const Tree<F>& tree, const F* groups, int64_t rows, float* bounds, int64_t step,
               int64_t width, const Candidates& candidates, int64_t most, int32_t* index) {
    const auto top = static_cast<int64_t>(tree.panels.size());
    const int64_t branch = tree.branch;
    // The first level is that of the children of all nodes above it.
    int64_t parents = (width + branch - 1) / branch;
    int32_t* nodes = nodes_.get(std::max(parents, tree.opened));
    for (int64_t i = 0; i < parents; ++i) {
      nodes[i] = static_cast<int32_t>(i);
    }
    for (int64_t level = top; level >= 0; --level) {
      if (level < top) {
        width = parents * branch;
        step = row_step(width);
        bounds = bounds_.get(rows * step);
        open(tree, level, groups, rows, nodes, parents, bounds, step);
      }
      rank(bounds, rows, step, nodes, width, branch, tree.size(level), candidates);
      int32_t* best = best_.get(std::max(tree.opened, most));
      parents = order_.find(rank_.get(0), width, level > 0 ? tree.opened : most, best);
      // Ascending like their parents, so that none is written before it is read.
      for (int64_t i = 0; i < parents; ++i) {
        best[i] = static_cast<int32_t>(nodes[best[i] / branch] * branch + best[i] % branch);
      }
      std::copy(best, best + parents, level > 0 ? nodes : index);
    }
    return parents;
  }

 private:
  static constexpr bool kCoarse = !std::is_same_v<F, float>;
  // Panels that come closer at a time.
  static constexpr int64_t kAhead = 4;

  // Bounds of the children of some nodes of the level above. Panels lie anywhere in memory; what is
  // next comes closer while another is worked at.
  static void open(const Tree<F>& tree, int64_t level, const F* groups, int64_t rows,
                   const int32_t* nodes, int64_t count, float* bounds, int64_t step) {
    const int64_t branch = tree.branch, panel = tree.inner * branch;
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) {
        const F* later = tree.panels[level] + nodes[i + kAhead] * panel;
        for (int64_t at = 0; at < panel; at += 64 / static_cast<int64_t>(sizeof(F))) {
          __builtin_prefetch(later + at, 0, 2);
        }
      }
      multiply<F>(rows, branch, tree.inner, groups, tree.inner,
                  tree.panels[level] + nodes[i] * panel, branch, bounds + i * branch, step);
    }
  }

  // What nodes are worth: their largest log-probability in any row, among those that hold nothing
  // but candidates. One that holds others, too, is opened unseen.
  void rank(float* bounds, int64_t rows, int64_t step, const int32_t* parents, int64_t width,
            int64_t branch, int64_t size, const Candidates& candidates) {
    unseen_.clear();
    hidden_.clear();
    for (int64_t i = 0; i * branch < width; ++i) {
      const int64_t first = parents[i] * branch * size, last = first + branch * size;
      if (!candidates.all(first, last) || first < candidates.sinks || last > candidates.leaves) {
        sort_out(first, size, i * branch, std::min(branch, width - i * branch), candidates, bounds,
                 rows, step);
      }
    }
    lines_.begin(rows);
    float* lse = lse_.get(rows);
    for (int64_t r = 0; r < rows; ++r) {
      lines_.template add<kCoarse>(r, bounds + r * step, width);
      lse[r] = lines_.lse(r);
    }
    float* rank = rank_.get(width);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      Vec best(kHidden);
      for (int64_t r = 0; r < rows; ++r) {
        best = larger(best, Vec::loadu(bounds + r * step + i) - Vec(lse[r]));
      }
      best.store(rank + i);
    }
    for (; i < width; ++i) {
      rank[i] = kHidden;
      for (int64_t r = 0; r < rows; ++r) {
        rank[i] = std::max(rank[i], bounds[r * step + i] - lse[r]);
      }
    }
    for (const int64_t column : unseen_) {
      rank[column] = -kHidden;
    }
    for (const int64_t column : hidden_) {
      rank[column] = kHidden;
    }
  }

  // Hides the bounds of nodes that must not be known, and notes what those are worth all the same.
  void sort_out(int64_t first, int64_t size, int64_t column, int64_t count,
                const Candidates& candidates, float* bounds, int64_t rows, int64_t step) {
    for (int64_t c = column; c < column + count; ++c, first += size) {
      const int64_t last = first + size;
      const bool none = candidates.none(first, last);
      if (none || !candidates.all(first, std::min(last, candidates.leaves))) {
        for (int64_t r = 0; r < rows; ++r) {
          bounds[r * step + c] = kHidden;
        }
        if (!none) {
          unseen_.push_back(c);
        }
      }
      if (none || last <= candidates.sinks) {
        hidden_.push_back(c);
      }
    }
  }

  Buffer<float> bounds_, rank_, lse_;
  Buffer<int32_t> nodes_, best_;
  std::vector<int64_t> unseen_, hidden_;
  Lines lines_;
  Best order_;
};

}  // namespace longswift
