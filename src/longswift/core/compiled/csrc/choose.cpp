// Key tokens by bounds: propose blocks of keys for a block of queries, re-rank their tokens exactly.
#include "best.h"
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

// Scores of boxes a thread holds at once, and columns of a panel of them.
constexpr int64_t kScores = 1 << 21;
constexpr int64_t kMostRows = 64;
constexpr int64_t kKeys = 64;

template <typename F>
struct Space {
  Buffer<F> groups, queries, keys;
  Buffer<float> bounds, rank, scores, top, total;
  Buffer<int32_t> blocks, tokens, best;
  Best order;
};

template <typename F>
Space<F>& space() {
  static thread_local Space<F> mine;
  return mine;
}

// Boxes around every `size` of `count` rows, as [groups, 3 * dim]: centre, what meets the radius of
// a block, what meets the absolute centre of one.
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
    for (int64_t d = 0; d < dim; ++d) {
      const float centre = (low[d] + high[d]) / 2, radius = (high[d] - low[d]) / 2;
      line[d] = centre;
      line[dim + d] = choice.key_radius * (std::abs(centre) + radius);
      line[2 * dim + d] = choice.row_radius * radius;
    }
    convert(out, line, 3 * dim);
    out += 3 * dim;
  }
}

// One head of one batch row.
template <typename T, typename F>
class Chooser {
 public:
  Chooser(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
          const at::Tensor& boxes, const at::Tensor& edges, at::Tensor& tokens, int64_t batch,
          int64_t head, const Choice& choice)
      : choice_(choice),
        dim_(q.size(3)),
        k_len_(k.size(2)),
        heads_(q.size(1) / k.size(1)),
        groups_of_block_((choice.block + choice.row_group - 1) / choice.row_group),
        rows_of_block_(heads_ * groups_of_block_),
        width_(boxes.size(3)),
        k_(rows_of<const T>(k, batch, head)),
        panels_(boxes.data_ptr<F>() + (batch * k.size(1) + head) * boxes.stride(0)),
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

  // Blocks [first, first + count) of the queries, the first of which starts at row `row`.
  void run(int64_t first, int64_t count, int64_t row) {
    int64_t done = 0;
    while (done < count) {
      int64_t needed = reach(first + done);
      int64_t some = 1;
      while (done + some < count && rows_of_block_ * (some + 1) <= kMostRows) {
        const int64_t wider = std::max(needed, reach(first + done + some));
        if (rows_of_block_ * (some + 1) * round_up(wider, 64) > kScores) {
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

  void propose_and_choose(int64_t first, int64_t count, int64_t row, int64_t needed) {
    const int64_t rows = count * rows_of_block_, inner = 3 * dim_;
    const int64_t step = round_up(needed, 64);
    F* groups = mine_.groups.get(rows * inner);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t g = 0; g < heads_; ++g) {
        describe_rows<T, F>(q_[g], row + n * choice_.block, choice_.block, choice_.row_group, dim_,
                            choice_, groups + (n * rows_of_block_ + g * groups_of_block_) * inner);
      }
    }
    float* bounds = mine_.bounds.get(rows * step);
    for (int64_t column = 0; column < step; column += width_) {
      multiply<F>(rows, std::min(width_, step - column), inner, groups, inner,
                  panels_ + column * inner, width_, bounds + column, step);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = first + n;
      const int64_t start = std::min(before(block), blocks_), end = after(block);
      float* of_block = bounds + n * rows_of_block_ * step;
      const int64_t found = propose(of_block, step, start, end);
      if (found > 0) {
        choose(found, row + n * choice_.block, tokens_ + block * choice_.budget);
      }
    }
  }

  // Writes the candidates, ascending, to `blocks`: those with sinks, then those worth most.
  int64_t propose(float* bounds, int64_t step, int64_t start, int64_t end) {
    float* rank = mine_.rank.get(blocks_);
    int32_t* found = mine_.blocks.get(choice_.sink_blocks + choice_.proposed);
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
  void choose(int64_t proposed, int64_t row, int32_t* chosen) {
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
    const int64_t tall = round_up(count, 32), columns = round_up(choice_.block, kLanes);
    F* keys = mine_.keys.get(tall * dim_);
    gather(tokens, count, keys);
    std::memset(static_cast<void*>(keys + count * dim_), 0, (tall - count) * dim_ * sizeof(F));
    float* rank = mine_.rank.get(count);
    std::fill(rank, rank + count, kHidden);
    float* scores = mine_.scores.get(tall * columns);
    F* packed = mine_.queries.get(dim_ * columns);
    for (int64_t g = 0; g < heads_; ++g) {
      pack_queries(q_[g], row, columns, packed);
      begin_rows(columns, lse_[g] + row);
      for (int64_t t = 0; t < tall; t += kKeys) {
        const int64_t some = std::min(kKeys, tall - t);
        float* part = scores + t * columns;
        multiply<F>(some, columns, dim_, keys + t * dim_, dim_, packed, columns, part, columns);
        add_keys(part, std::min(some, count - t), columns);
      }
      rank_tokens(scores, count, columns, rank);
    }
    for (int64_t t = 0; t < count && tokens[t] < choice_.sinks; ++t) {
      rank[t] = kHidden;
    }
    int32_t* best = mine_.best.get(choice_.budget);
    const int64_t taken = mine_.order.find(rank, count, choice_.budget, best);
    for (int64_t i = 0; i < taken; ++i) {
      chosen[i] = tokens[best[i]];
    }
  }

  void pack_queries(const Rows<const T>& q, int64_t row, int64_t columns, F* packed) {
    if constexpr (std::is_same_v<T, F>) {
      pack_transposed<F>(q.row(row), q.step, choice_.block, dim_, packed, columns);
    } else {
      F* wide = mine_.groups.get(choice_.block * dim_);
      for (int64_t i = 0; i < choice_.block; ++i) {
        convert(wide + i * dim_, q.row(row + i), dim_);
      }
      pack_transposed<F>(wide, dim_, choice_.block, dim_, packed, columns);
    }
  }

  // The softmax of a row (a column here) is over all tokens and the band.
  void begin_rows(int64_t columns, const float* band_lse) {
    float *top = mine_.top.get(columns), *total = mine_.total.get(columns);
    for (int64_t c = 0; c < columns; ++c) {
      top[c] = c < choice_.block ? band_lse[c] : 0.0f;
      total[c] = 1.0f;
    }
  }

  // Adds keys to every row's sum while their scores are in the nearest cache.
  void add_keys(float* scores, int64_t count, int64_t columns) {
    float *top = mine_.top.get(0), *total = mine_.total.get(0);
    int64_t c = 0;
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
      add_to_columns<4>(scores + c, count, columns, top + c, total + c);
    }
    for (; c < columns; c += kLanes) {
      add_to_columns<1>(scores + c, count, columns, top + c, total + c);
    }
  }

  template <int parts>
  void add_to_columns(float* scores, int64_t count, int64_t step, float* top, float* total) {
    const Vec scale(choice_.scale);
    Vec before[parts], high[parts], sum[parts];
    for (int p = 0; p < parts; ++p) {
      high[p] = before[p] = Vec::loadu(top + p * kLanes);
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int p = 0; p < parts; ++p) {
        const Vec x = Vec::loadu(scores + t * step + p * kLanes) * scale;
        x.store(scores + t * step + p * kLanes);
        high[p] = at::vec::maximum(high[p], x);
      }
    }
    for (int p = 0; p < parts; ++p) {
      sum[p] = Vec::loadu(total + p * kLanes) * (before[p] - high[p]).exp_u20();
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int p = 0; p < parts; ++p) {
        sum[p] += (Vec::loadu(scores + t * step + p * kLanes) - high[p]).exp_u20();
      }
    }
    for (int p = 0; p < parts; ++p) {
      high[p].store(top + p * kLanes);
      sum[p].store(total + p * kLanes);
    }
  }

  // Raises each token's rank to its largest log-probability.
  void rank_tokens(const float* scores, int64_t count, int64_t columns, float* rank) {
    float *lse = mine_.total.get(0), *top = mine_.top.get(0);
    for (int64_t c = 0; c < choice_.block; ++c) {
      lse[c] = top[c] + std::log(lse[c]);
    }
    // Columns that are no rows rank nothing.
    std::fill(lse + choice_.block, lse + columns, -kHidden);
    for (int64_t t = 0; t < count; ++t) {
      Vec best(kHidden);
      const float* of_token = scores + t * columns;
      for (int64_t part = 0; part < columns; part += kLanes) {
        best = at::vec::maximum(best, Vec::loadu(of_token + part) - Vec::loadu(lse + part));
      }
      rank[t] = std::max(rank[t], max_of(best));
    }
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
  const int64_t dim_, k_len_, heads_, groups_of_block_, rows_of_block_, width_;
  const Rows<const T> k_;
  const F* panels_;
  const int64_t* edges_;
  int32_t* tokens_;
  Space<F>& mine_;
  int64_t blocks_;
  std::vector<Rows<const T>> q_;
  std::vector<const float*> lse_;
};

// Boxes around blocks of keys, in panels.
template <typename T, typename F>
void describe_keys(const at::Tensor& k, at::Tensor& boxes, int64_t batch, int64_t head,
                   int64_t panel, int64_t key_block) {
  const int64_t dim = k.size(3), k_len = k.size(2), width = boxes.size(3), inner = 3 * dim;
  const auto keys = rows_of<const T>(k, batch, head);
  F* out = boxes.data_ptr<F>() + (batch * k.size(1) + head) * boxes.stride(0) +
      panel * boxes.stride(1);
  static thread_local Buffer<F> lines;
  F* line = lines.get(width * inner);
  float low[dim], high[dim], row[dim], box[3 * dim];
  for (int64_t j = 0; j < width; ++j) {
    const int64_t first = (panel * width + j) * key_block;
    const int64_t end = std::min(first + key_block, k_len);
    if (first >= end) {
      std::memset(static_cast<void*>(line + j * inner), 0, inner * sizeof(F));
      continue;
    }
    std::fill(low, low + dim, -kHidden);
    std::fill(high, high + dim, kHidden);
    for (int64_t t = first; t < end; ++t) {
      convert(row, keys.row(t), dim);
      for (int64_t d = 0; d < dim; ++d) {
        low[d] = std::min(low[d], row[d]);
        high[d] = std::max(high[d], row[d]);
      }
    }
    for (int64_t d = 0; d < dim; ++d) {
      box[d] = (low[d] + high[d]) / 2;
      box[dim + d] = (high[d] - low[d]) / 2;
      box[2 * dim + d] = std::abs(box[d]);
    }
    convert(line + j * inner, box, inner);
  }
  pack_transposed<F>(line, inner, width, inner, out, width);
}

}  // namespace

void describe_boxes(const at::Tensor& k, at::Tensor boxes, int64_t batch, int64_t head,
                    int64_t panel, int64_t key_block) {
  by_types(k.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    describe_keys<decltype(in), decltype(factor)>(k, boxes, batch, head, panel, key_block);
  });
}

void choose_by_bounds(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                      const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                      int64_t batch, int64_t head, int64_t first, int64_t count, int64_t row,
                      const Choice& choice) {
  by_types(q.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    ProductScope scope;
    Chooser<decltype(in), decltype(factor)>(q, k, band_lse, boxes, edges, tokens, batch, head,
                                            choice)
        .run(first, count, row);
  });
}

}  // namespace longswift
