// Key tokens by bounds: propose blocks of keys for a block of queries, re-rank their tokens exactly.
#include "best.h"
#include "centroids.h"
#include "columns.h"
#include "common.h"
#include "kernels.h"
#include "lines.h"
#include "tile_products.h"

namespace longswift {

namespace {

// Scores of boxes a thread holds at once, and columns of a panel of them.
constexpr int64_t kScores = 1 << 21;
// Exact scores held at once.
constexpr int64_t kExact = 5 << 16;
constexpr int64_t kMostRows = 64;
constexpr int64_t kKeys = 64;
constexpr int64_t kColumns = 128;
// Boxes whose scores are summed up while they are in the nearest caches.
constexpr int64_t kStretch = 512;
// Of many candidates every 8th tile of 64 keys, the first of them the fifth, stands for all in sums
// that only weigh groups of rows against each other.
constexpr int64_t kMany = 4096, kEvery = 8, kFirst = 4;
// Ranks of keys a thread holds at once.
constexpr int64_t kRanks = 1 << 21;

template <typename F>
struct Space {
  Buffer<F> groups, queries, keys, wide, highest, lowest;
  Buffer<float> bounds, rank, exact, scores;
  Buffer<int32_t> blocks, tokens, best;
  Best order;
  Columns columns;
  Lines lines;
  Centroids centroids;
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
  static constexpr bool kCoarse = !std::is_same_v<F, float>;

 public:
  Chooser(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
          const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
          const Choice& choice)
      : choice_(choice),
        dim_(q.size(3)),
        q_len_(q.size(2)),
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
  // Rows are bounded in groups; `boxes [panels, 3 * dim, width]` are those of the keys.
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

  // Complete blocks like those of `run`, whose rows are scored in groups of at most `most` similar
  // ones, key by key; at positions beyond `far` of twice as many rows, beyond twice `far` of four
  // times as many.
  void run_centroids(int64_t first, int64_t count, int64_t row, int64_t most, int64_t far) {
    const auto rows_at = [&](int64_t n) {
      const int64_t position = choice_.causal ? k_len_ - q_len_ + row + n * choice_.block : k_len_;
      int64_t rows = most;
      for (int64_t reach = far; reach < position; reach *= 2) {
        rows *= 2;
      }
      return rows;
    };
    int64_t done = 0;
    while (done < count) {
      if (reach(first + done) == 0) {
        ++done;
        continue;
      }
      const int64_t at_row = row + done * choice_.block, rows = rows_at(done);
      const int64_t groups = mine_.centroids.find(q_, at_row, choice_.block, dim_, rows);
      const int64_t columns = round_up(groups, kLanes);
      int64_t some = std::min(kColumns / columns, kRanks / std::max<int64_t>(blocks_, 1));
      some = std::min(std::max<int64_t>(some, 1), count - done);
      const bool many = has_many(first + done);
      for (int64_t n = 1; n < some; ++n) {
        if (has_many(first + done + n) != many || rows_at(done + n) != rows) {
          some = n;
        }
      }
      propose_by_centroids(first + done, some, at_row, rows, groups, columns);
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

  void propose_and_choose(int64_t first, int64_t count, int64_t row, int64_t needed) {
    const int64_t rows = count * rows_of_block_, inner = 3 * dim_;
    const int64_t width = round_up(needed, width_), step = row_step(width);
    F* groups = mine_.groups.get(rows * inner);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t g = 0; g < heads_; ++g) {
        describe_rows<T, F>(q_[g], row + n * choice_.block, choice_.block, choice_.row_group, dim_,
                            choice_, groups + (n * rows_of_block_ + g * groups_of_block_) * inner);
      }
    }
    float* bounds = mine_.bounds.get(rows * step);
    mine_.lines.begin(rows);
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
          mine_.lines.template add<kCoarse>(r, of_row + start, end - start);
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

  bool has_many(int64_t block) const {
    return std::min(before(block), blocks_) + blocks_ - after(block) >= kMany;
  }

  // Scores are computed for their sums and once more, as they would fill more than a core's caches.
  void propose_by_centroids(int64_t first, int64_t count, int64_t row, int64_t most,
                            int64_t groups, int64_t columns) {
    const int64_t all = count * columns;
    F* packed = mine_.queries.get(dim_ * all);
    F* lines = mine_.groups.get(groups * dim_);
    float line[dim_];
    int64_t last = 0;
    for (int64_t n = 0; n < count; ++n) {
      if (n > 0) {
        mine_.centroids.find(q_, row + n * choice_.block, choice_.block, dim_, most);
      }
      for (int64_t g = 0; g < groups; ++g) {
        mine_.centroids.mean(g, line);
        convert(lines + g * dim_, line, dim_);
      }
      F* own = packed_at(packed, n * columns);
      pack_transposed<F>(lines, dim_, groups, dim_, own, all);
      clear_columns<F>(own, dim_, all, groups, columns);
      last = std::max(last, reach(first + n));
    }
    float* scores = mine_.bounds.get(kKeys * all);
    float* rank = mine_.rank.get(count * last);
    std::fill(rank, rank + count * last, kHidden);
    mine_.columns.begin(all, all);
    const auto each_tile = [&](int64_t first_tile, int64_t every, auto&& use) {
      const TileProducts<F> products(dim_);
      for (int64_t t = first_tile * kKeys; t < last; t += every * kKeys) {
        const int64_t tall = std::min(kKeys, last - t), next = t + every * kKeys;
        fetch(k_, next, std::min(kKeys, last - next), dim_);
        int64_t step;
        const F* keys = boxes_of(k_, t, tall, mine_.keys, &step);
        products.multiply(keys, step, kKeys, packed, all, scores);
        for (int64_t n = 0; n < count; ++n) {
          const int64_t from = std::max(t, before(first + n));
          const int64_t to = std::min(t + tall, choice_.causal ? last : after(first + n));
          for (int64_t k = from; k < to; ++k) {
            float* of_key = scores + (k - t) * all + n * columns;
            std::fill(of_key, of_key + columns, kHidden);
          }
        }
        use(t, tall);
      }
    };
    const bool many = has_many(first);
    each_tile(many ? kFirst : 0, many ? kEvery : 1, [&](int64_t, int64_t tall) {
      mine_.columns.template add<kCoarse>(scores, tall, choice_.scale);
    });
    mine_.columns.finish();
    for (int64_t n = 0; n < count; ++n) {
      mine_.columns.drop(n * columns + groups, (n + 1) * columns);
    }
    each_tile(0, 1, [&](int64_t t, int64_t tall) {
      for (int64_t n = 0; n < count; ++n) {
        mine_.columns.raise(scores, tall, choice_.scale, rank + n * last + t, n * columns, columns);
      }
    });
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = first + n;
      const int64_t start = std::min(before(block), blocks_);
      const int64_t end = choice_.causal ? start : blocks_;
      const int64_t found = take(rank + n * last, start, after(block), end);
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
    for_rows(rows, kColumns, [&](int64_t first_row, int64_t some, int64_t columns) {
      F* up = mine_.queries.get(2 * dim_ * columns);
      F* down = up + dim_ * columns;
      F* lines = mine_.wide.get(2 * some * dim_);
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
      float* scores = mine_.bounds.get((blocks_ + kKeys) * columns);
      mine_.columns.begin(some, columns);
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
          mine_.columns.template add<kCoarse>(part, tall, 1.0f);
        }
      }
      mine_.columns.finish();
      for (const auto& stretch : stretches) {
        mine_.columns.raise(scores + stretch[0] * columns, stretch[1] - stretch[0], 1.0f,
                            rank + stretch[0], 0, columns);
      }
    });
    return take(rank, start, end, last);
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

  // Some of the rows of all heads at a time, at most `most`: first, how many, columns.
  template <typename Call>
  void for_rows(int64_t rows, int64_t most, Call&& call) const {
    for (int64_t first = 0; first < heads_ * rows; first += most) {
      const int64_t some = std::min(most, heads_ * rows - first);
      call(first, some, round_up(some, kLanes));
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
      lse[r] = mine_.lines.lse(line + r);
    }
    for_candidates(block, [&](int64_t from, int64_t to) {
      raise(rank, bounds, step, lse, from, to);
    });
    return take(rank, start, after(block), last);
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

  // The largest log-probability of the blocks [from, to) in any of the groups.
  void raise(float* rank, const float* scores, int64_t step, const float* lse, int64_t from,
             int64_t to) const {
    int64_t i = from;
    for (; i + kLanes <= to; i += kLanes) {
      Vec best(kHidden);
      for (int64_t r = 0; r < rows_of_block_; ++r) {
        best = at::vec::maximum(best, Vec::loadu(scores + r * step + i) - Vec(lse[r]));
      }
      best.store(rank + i);
    }
    for (; i < to; ++i) {
      for (int64_t r = 0; r < rows_of_block_; ++r) {
        rank[i] = std::max(rank[i], scores[r * step + i] - lse[r]);
      }
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
  const int64_t dim_, q_len_, k_len_, heads_, groups_of_block_, rows_of_block_;
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

void choose_by_centroids(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                         const at::Tensor& edges, at::Tensor tokens, at::IntArrayRef places,
                         const Choice& choice, int64_t rows, int64_t far, bool narrow) {
  by_types(q.scalar_type(), narrow, [&](auto in, auto factor) {
    for_each_place(places, 5, [&](at::IntArrayRef at) {
      Chooser<decltype(in), decltype(factor)>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run_centroids(at[2], at[3], at[4], rows, far);
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
