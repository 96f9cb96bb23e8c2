// Key tokens by scores of columns: means of similar rows, or the few rows of a cut block.
#include "centroids.h"
#include "chooser.h"
#include "common.h"
#include "kernels.h"
#include "tile_products.h"

namespace longswift {

namespace {

// Of many candidates every 8th tile of 64 keys, the first of them the fifth, stands for all in sums
// that only weigh groups of rows against each other.
constexpr int64_t kMany = 4096, kEvery = 8, kFirst = 4;
// Ranks of keys a thread holds at once.
constexpr int64_t kRanks = 1 << 21;

template <typename F>
struct Space {
  Buffer<F> means, highest, lowest;
  Buffer<float> scores;
  Centroids centroids;
};

template <typename F>
Space<F>& space() {
  static thread_local Space<F> mine;
  return mine;
}

template <typename T, typename F>
class ByColumns : Chooser<T, F> {
  using Base = Chooser<T, F>;

 public:
  ByColumns(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
            const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
            const Choice& choice)
      : Base(q, k, band_lse, edges, tokens, batch, head, choice), own_(space<F>()) {}

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
      if (reach(first + done) == 0) {
        ++done;
        continue;
      }
      const int64_t at_row = row + done * rows, together = most_at(done);
      const int64_t groups = own_.centroids.find(q_, at_row, rows, dim_, together);
      const int64_t columns = round_up(groups, kLanes);
      int64_t some = std::min(kColumns / columns, kRanks / std::max<int64_t>(blocks_, 1));
      some = std::min(std::max<int64_t>(some, 1), count - done);
      const bool many = has_many(first + done);
      for (int64_t n = 1; n < some; ++n) {
        if (has_many(first + done + n) != many || most_at(done + n) != together) {
          some = n;
        }
      }
      propose_by_centroids(first + done, some, at_row, rows, together, groups, columns);
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
  using Base::before;
  using Base::blocks_;
  using Base::choice_;
  using Base::choose;
  using Base::dim_;
  using Base::for_rows;
  using Base::kCoarse;
  using Base::kColumns;
  using Base::kKeys;
  using Base::k_;
  using Base::k_len_;
  using Base::mine_;
  using Base::packed_at;
  using Base::q_;
  using Base::q_len_;
  using Base::reach;
  using Base::take;
  using Base::tokens_;

  bool has_many(int64_t block) const {
    return std::min(before(block), blocks_) + blocks_ - after(block) >= kMany;
  }

  // Scores are computed for their sums and once more, as they would fill more than a core's caches.
  void propose_by_centroids(int64_t first, int64_t count, int64_t row, int64_t rows, int64_t most,
                            int64_t groups, int64_t columns) {
    const int64_t all = count * columns;
    F* packed = mine_.queries.get(dim_ * all);
    F* lines = own_.means.get(groups * dim_);
    float line[dim_];
    int64_t last = 0;
    for (int64_t n = 0; n < count; ++n) {
      if (n > 0) {
        own_.centroids.find(q_, row + n * rows, rows, dim_, most);
      }
      for (int64_t g = 0; g < groups; ++g) {
        own_.centroids.mean(g, line);
        convert(lines + g * dim_, line, dim_);
      }
      F* own = packed_at(packed, n * columns);
      pack_transposed<F>(lines, dim_, groups, dim_, own, all);
      clear_columns<F>(own, dim_, all, groups, columns);
      last = std::max(last, reach(first + n));
    }
    float* scores = own_.scores.get(kKeys * all);
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
        choose(found, row + n * rows, rows, tokens_ + block * choice_.budget);
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
      float* scores = own_.scores.get((blocks_ + kKeys) * columns);
      mine_.columns.begin(some, columns);
      const int64_t stretches[2][2] = {{0, start}, {end, last}};
      for (const auto& stretch : stretches) {
        for (int64_t j = stretch[0]; j < stretch[1]; j += kKeys) {
          const int64_t tall = std::min(kKeys, stretch[1] - j);
          int64_t step;
          float* part = scores + j * columns;
          // Always as many rows; the scores of those that are not there are written over or unread.
          const F* box = boxes_of(high, j, tall, own_.highest, &step);
          multiply<F>(kKeys, columns, dim_, box, step, up, columns, part, columns);
          box = boxes_of(low, j, tall, own_.lowest, &step);
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

  Space<F>& own_;
};

}  // namespace

void choose_by_centroids(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                         const at::Tensor& edges, at::Tensor tokens, at::IntArrayRef places,
                         const Choice& choice, int64_t rows, int64_t far, bool narrow) {
  by_ranked_types(q.scalar_type(), narrow, [&](auto in, auto factor) {
    for_each_place(places, 6, [&](at::IntArrayRef at) {
      ByColumns<decltype(in), decltype(factor)>(q, k, band_lse, edges, tokens, at[0], at[1], choice)
          .run_centroids(at[2], at[3], at[4], at[5], rows, far);
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
