// Attention of blocks of queries to gathered tokens and pooled means, merged into their windows'.
#include "few_rows.h"
#include "kernels.h"
#include "pool_columns.h"
#include "tile_attention.h"

namespace longswift {

namespace {

// Keys of a panel: the columns of one product.
constexpr int64_t kPanel = 512;

template <typename F>
struct Space {
  Buffer<F> keys, values, packed_keys, packed_values, queries, probs;
  Buffer<float> scores, bias, part, sums, tops, mean_keys, mean_values, counts;
  Buffer<int32_t> tokens;
};

// T: the inputs, F: factors of products.
template <typename T, typename F>
class Merger {
 public:
  Merger(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& tokens,
         const at::Tensor& k_grain, const at::Tensor& v_grain, const at::Tensor& k_sum,
         const at::Tensor& v_sum, const at::Tensor& edges, at::Tensor& out, at::Tensor& lse,
         int64_t batch, int64_t head, const Gather& how)
      : how_(how),
        dim_(q.size(3)),
        value_dim_(v.size(3)),
        q_len_(q.size(2)),
        k_len_(k.size(2)),
        heads_(q.size(1) / k.size(1)),
        slots_(tokens.size(3)),
        k_(rows_of<const T>(k, batch, head)),
        v_(rows_of<const T>(v, batch, head)),
        tokens_(tokens.data_ptr<int32_t>() + (tokens.size(0) > 1 ? batch : 0) * tokens.stride(0) +
                head * tokens.stride(1)),
        token_step_(tokens.stride(2)),
        edges_(edges.data_ptr<int64_t>() + head * edges.stride(0)),
        unit_(takes_tiles<F>(dim_, value_dim_)),
        mine_(of_thread<Space<F>>()) {
    for (int64_t g = 0; g < heads_; ++g) {
      const int64_t own = head * heads_ + g;
      q_.push_back(rows_of<const T>(q, batch, own));
      out_.push_back(rows_of<T>(out, batch, own));
      lse_.push_back(lse.data_ptr<float>() + batch * lse.stride(0) + own * lse.stride(1));
    }
    if (how.pool > 0) {
      pools_ = k_sum.size(2);
      key_grains_ = rows_of<const float>(k_grain, batch, head);
      value_grains_ = rows_of<const float>(v_grain, batch, head);
      key_sums_ = rows_of<const float>(k_sum, batch, head);
      value_sums_ = rows_of<const float>(v_sum, batch, head);
    }
  }

  void run(int64_t first, int64_t count) {
    const int64_t offset = k_len_ - q_len_, base = offset / how_.block;
    for (int64_t n = first; n < first + count; ++n) {
      const int64_t start = std::max(offset, (base + n) * how_.block);
      const int64_t end = std::min(k_len_, (base + n + 1) * how_.block);
      if (end - start == 1 && heads_ <= kFewRows) {
        attend_row(n, start - offset);
        continue;
      }
      const int64_t keys = load(n);
      next_ = n + 1 < first + count ? tokens_ + (n + 1) * token_step_ : nullptr;
      if (keys > 0) {
        attend(start - offset, end - start, keys);
      }
    }
  }

 private:
  static constexpr bool kNarrow = std::is_same_v<F, at::BFloat16>;

  void fetch_token(int64_t token) const {
    fetch(k_, token, 1, dim_);
    fetch(v_, token, 1, value_dim_);
  }

  // Lists the tokens a block has gathered; returns how many.
  int64_t list_tokens(int64_t block) {
    const int32_t* slots = tokens_ + block * token_step_;
    int32_t* tokens = mine_.tokens.get(slots_);
    int64_t count = 0;
    for (int64_t c = 0; c < slots_; ++c) {
      tokens[count] = slots[c];
      count += slots[c] >= 0;
    }
    return count;
  }

  // The only row of a block, of all heads.
  void attend_row(int64_t block, int64_t row) {
    FewRows rows(heads_, dim_, value_dim_, static_cast<float>(how_.scale));
    for (int64_t g = 0; g < heads_; ++g) {
      rows.set(g, q_[g].row(row));
    }
    const int64_t count = list_tokens(block);
    const int32_t* tokens = mine_.tokens.get(0);
    rows.add<T>(
        count, [&](int64_t i) { return k_.row(tokens[i]); },
        [&](int64_t i) { return v_.row(tokens[i]); });
    if (how_.pool > 0) {
      const int64_t columns =
          pool_columns(tokens, count, edges_[2 * block], edges_[2 * block + 1]);
      // In place: a mean never lies behind the sums it is made of.
      float *keys = mine_.mean_keys.get(0), *values = mine_.mean_values.get(0);
      float* bias = mine_.bias.get(columns);
      const int64_t some = add_means(columns, keys, values, bias);
      rows.add<float>(
          some, [&](int64_t i) { return keys + i * dim_; },
          [&](int64_t i) { return values + i * value_dim_; }, bias);
    }
    for (int64_t g = 0; g < heads_ && rows.sees(g); ++g) {
      merge(g, row, 1, rows.part() + g * value_dim_, rows.tops() + g, rows.totals() + g);
    }
  }

  // What a block sees beside its window, as keys, values and biases; returns how many.
  int64_t load(int64_t block) {
    const int32_t* slots = tokens_ + block * token_step_;
    const int64_t count = list_tokens(block);
    int32_t* tokens = mine_.tokens.get(0);
    if (slots != fetched_) {
      for (int64_t t = 0; t < count; ++t) {
        fetch_token(tokens[t]);
      }
    }
    const int64_t start = edges_[2 * block], end = edges_[2 * block + 1];
    const int64_t columns = how_.pool > 0 ? pool_columns(tokens, count, start, end) : 0;
    const int64_t width = round_up(count + columns, 64);
    if (count + columns == 0) {
      return 0;
    }
    F* keys = mine_.keys.get(width * dim_);
    F* values = mine_.values.get(width * value_dim_);
    float* bias = mine_.bias.get(width);
    for (int64_t t = 0; t < count; ++t) {
      convert(keys + t * dim_, k_.row(tokens[t]), dim_);
      convert(values + t * value_dim_, v_.row(tokens[t]), value_dim_);
    }
    std::fill(bias, bias + count, 0.0f);
    tokens_loaded_ = count;
    const int64_t at = count +
        add_means(columns, keys + count * dim_, values + count * value_dim_, bias + count);
    std::fill(bias + at, bias + width, kHidden);
    std::memset(static_cast<void*>(keys + at * dim_), 0, (width - at) * dim_ * sizeof(F));
    std::memset(static_cast<void*>(values + at * value_dim_), 0,
                (width - at) * value_dim_ * sizeof(F));
    if (at == 0) {
      return 0;
    }
    F* packed_keys = mine_.packed_keys.get(width * dim_);
    F* packed_values = mine_.packed_values.get(width * value_dim_);
#if defined(LONGSWIFT_PAIRS)
    if constexpr (kNarrow) {
      if (unit_.used()) {
        const TileAttention tiles(dim_, value_dim_, static_cast<float>(how_.scale));
        tiles.pack_keys(keys, dim_, width, packed_keys);
        tiles.pack_values(values, value_dim_, width, packed_values);
        return width;
      }
    }
#endif
    for (int64_t p = 0; p < width; p += kPanel) {
      const int64_t some = std::min(kPanel, width - p);
      pack_transposed<F>(keys + p * dim_, dim_, some, dim_, packed_keys + p * dim_, some);
    }
    pack_pairs<F>(values, value_dim_, width, value_dim_, packed_values, width);
    return width;
  }

  // Writes means of the columns that have tokens left, and logarithms of how many; returns how many
  // columns these are.
  template <typename To>
  int64_t add_means(int64_t columns, To* keys, To* values, float* bias) {
    const float* counts = mine_.counts.get(0);
    float *key_sums = mine_.mean_keys.get(0), *value_sums = mine_.mean_values.get(0);
    int64_t at = 0;
    for (int64_t c = 0; c < columns; ++c) {
      if (counts[c] <= 0.0f) {
        continue;
      }
      scaled_row(keys + at * dim_, key_sums + c * dim_, dim_, 1.0f / counts[c]);
      scaled_row(values + at * value_dim_, value_sums + c * value_dim_, value_dim_,
                 1.0f / counts[c]);
      bias[at++] = std::log(counts[c]);
    }
    return at;
  }

  template <typename To>
  static void scaled_row(To* out, float* row, int64_t n, float by) {
    for (int64_t d = 0; d < n; ++d) {
      row[d] *= by;
    }
    convert(out, row, n);
  }

  // Sums and counts of the pools outside the window, without the gathered tokens.
  int64_t pool_columns(const int32_t* tokens, int64_t count, int64_t start, int64_t end) {
    const PoolColumns columns(how_.pool, start, end, k_len_, pools_, how_.causal);
    float* counts = mine_.counts.get(columns.count);
    float* keys = mine_.mean_keys.get(columns.count * dim_);
    float* values = mine_.mean_values.get(columns.count * value_dim_);
    for (int64_t c = 0; c < columns.count; ++c) {
      const int64_t pool = columns.pool(c);
      if (pool >= 0) {
        whole(pool, c, counts, keys, values);
      } else {
        cut(columns, c, counts, keys, values);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = tokens[t], column = columns.of_token(token);
      counts[column] -= 1.0f;
      subtract(keys + column * dim_, k_.row(token), dim_);
      subtract(values + column * value_dim_, v_.row(token), value_dim_);
    }
    return columns.count;
  }

  void whole(int64_t pool, int64_t column, float* counts, float* keys, float* values) {
    counts[column] = static_cast<float>(std::min(how_.pool, k_len_ - pool * how_.pool));
    std::memcpy(keys + column * dim_, key_sums_.row(pool), dim_ * sizeof(float));
    std::memcpy(values + column * value_dim_, value_sums_.row(pool), value_dim_ * sizeof(float));
  }

  void cut(const PoolColumns& columns, int64_t column, float* counts, float* keys, float* values) {
    counts[column] = static_cast<float>(columns.cut(column));
    float *key = keys + column * dim_, *value = values + column * value_dim_;
    std::fill(key, key + dim_, 0.0f);
    std::fill(value, value + value_dim_, 0.0f);
    columns.for_each_grain(column, how_.grain, [&](int64_t g) {
      const float *more_key = key_grains_.row(g), *more_value = value_grains_.row(g);
      for (int64_t d = 0; d < dim_; ++d) {
        key[d] += more_key[d];
      }
      for (int64_t d = 0; d < value_dim_; ++d) {
        value[d] += more_value[d];
      }
    });
  }

  static void subtract(float* from, const T* row, int64_t n) {
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
      (Vec::loadu(from + d) - floats_at(row + d)).store(from + d);
    }
    for (; d < n; ++d) {
      from[d] -= static_cast<float>(row[d]);
    }
  }

  void attend(int64_t row, int64_t rows, int64_t width) {
#if defined(LONGSWIFT_PAIRS)
    if constexpr (kNarrow) {
      if (unit_.used()) {
        attend_by_unit(row, rows, width);
        return;
      }
    }
#endif
    const int64_t score_step = row_step(width);
    float* scores = mine_.scores.get(rows * score_step);
    F* probs = mine_.probs.get(rows * score_step);
    float* part = mine_.part.get(rows * value_dim_);
    const F* keys = mine_.packed_keys.get(0);
    const F* values = mine_.packed_values.get(0);
    for (int64_t g = 0; g < heads_; ++g) {
      int64_t step;
      const F* queries = factors<T, F>(q_[g], row, rows, dim_, mine_.queries, &step);
      for (int64_t p = 0; p < width; p += kPanel) {
        const int64_t some = std::min(kPanel, width - p);
        multiply<F>(rows, some, dim_, queries, step, keys + p * dim_, some, scores + p,
                    score_step);
      }
      float sums[rows], tops[rows];
      for (int64_t i = 0; i < rows; ++i) {
        weigh(scores + i * score_step, width, probs + i * score_step, tops + i, sums + i);
      }
      for (int64_t p = 0; p < width; p += kPanel) {
        const int64_t some = std::min(kPanel, width - p);
        multiply<F>(rows, value_dim_, some, probs + p, score_step, values + p * value_dim_, value_dim_,
                    part, value_dim_, p > 0);
      }
      merge(g, row, rows, part, tops, sums);
    }
  }

#if defined(LONGSWIFT_PAIRS)
  // Of what the next block has gathered the share `part / all`, from slot `fetched` on: all at once they
  // would wait for each other.
  void fetch_next(int64_t& fetched, int64_t part, int64_t all) const {
    const int64_t end = std::min(slots_, fetched + (slots_ * part + all - 1) / all);
    for (; next_ != nullptr && fetched < end; ++fetched) {
      if (next_[fetched] >= 0) {
        fetch_token(next_[fetched]);
      }
    }
  }

  void attend_by_unit(int64_t row, int64_t rows, int64_t width) {
    constexpr int64_t some = TileAttention::kRows, few = 64;
    const TileAttention tiles(dim_, value_dim_, static_cast<float>(how_.scale));
    const F* keys = mine_.packed_keys.get(0);
    const F* values = mine_.packed_values.get(0);
    float* bias = mine_.bias.get(0);
    const TileState state{mine_.part.get(some * value_dim_),
                          mine_.sums.get(some * TileAttention::kLines), mine_.tops.get(some)};
    // Tokens have no bias; where a bias may come, a scale may be negative.
    const int64_t plain =
        how_.scale > 0.0 ? tokens_loaded_ / TileAttention::kGroup * TileAttention::kGroup : 0;
    for (int64_t c = plain; c < width; ++c) {
      bias[c] *= kLog2e;
    }
    F* queries = mine_.queries.get(some * dim_);
    int64_t fetched = 0;
    // Heads of few rows, as when decoding, share a block.
    for (int64_t first = 0; first < heads_ * rows; first += some) {
      const int64_t tall = std::min(some, heads_ * rows - first);
      for (int64_t r = 0; r < tall; ++r) {
        convert(queries + r * dim_, q_[(first + r) / rows].row(row + (first + r) % rows), dim_);
      }
      std::fill(queries + tall * dim_, queries + some * dim_, F(0.0f));
      tiles.begin(state);
      for (int64_t c = 0; c < plain; c += few) {
        fetch_next(fetched, few * some, plain * heads_ * rows);
        tiles.add(queries, state, keys, values, c, std::min(c + few, plain));
      }
      tiles.add_biased(queries, state, keys, values, plain, width, bias + plain);
      float tops[some], totals[some];
      for (int64_t r = 0; r < tall; ++r) {
        tops[r] = state.tops[r] / kLog2e;
        totals[r] = TileAttention::total(state, r);
      }
      for (int64_t r = 0, n; r < tall; r += n) {
        const int64_t place = (first + r) % rows;
        n = std::min(tall - r, rows - place);
        merge((first + r) / rows, row + place, n, state.part + r * value_dim_, tops + r, totals + r);
      }
    }
    fetched_ = plain > 0 ? next_ : nullptr;
  }
#endif

  // Adds the biases to the scaled scores and turns them into unnormalised probabilities.
  void weigh(float* scores, int64_t width, F* probs, float* top, float* sum) {
    const float* bias = mine_.bias.get(0);
    const Vec scale(static_cast<float>(how_.scale));
    Vec highest(kHidden);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec x = at::vec::fmadd(Vec::loadu(scores + i), scale, Vec::loadu(bias + i));
      x.store(scores + i);
      highest = larger(highest, x);
    }
    *top = max_of(highest);
    *sum = exponentials(scores, width, 1.0f, *top, probs);
  }

  // Adds what `count` rows saw here, `part` of unnormalised weights that sum to `sums` relative to
  // `tops`, to what their bands saw.
  void merge(int64_t g, int64_t row, int64_t count, const float* part, const float* tops,
             const float* sums) {
    float keep[kLanes], add[kLanes];
    for (int64_t i = 0; i < count; i += kLanes) {
      weights(lse_[g] + row + i, tops + i, sums + i, std::min<int64_t>(kLanes, count - i), keep, add);
      for (int64_t r = i; r < std::min<int64_t>(i + kLanes, count); ++r) {
        T* out = out_[g].row(row + r);
        const float* more = part + r * value_dim_;
        const Vec old(keep[r - i]), by(add[r - i]);
        for (int64_t d = 0; d < value_dim_; d += kLanes) {
          convert(out + d, at::vec::fmadd(floats_at(out + d), old, Vec::loadu(more + d) * by));
        }
      }
    }
  }

  // What is kept of the bands' results and what of the parts is added; `lse` becomes that of both.
  static void weights(float* lse, const float* tops, const float* sums, int64_t count, float* keep,
                      float* add) {
    const Vec sum = Vec::loadu(sums, count), band = Vec::loadu(lse, count);
    const Vec mine = Vec::loadu(tops, count) + sum.log(), high = at::vec::maximum(mine, band);
    const Vec total = high + ((mine - high).exp() + (band - high).exp()).log();
    const auto share = [&](const Vec& x) {
      return Vec::blendv(Vec(0.0f), (x - total).exp(), x - total > Vec(kNegligible));
    };
    share(band).store(keep);
    (share(mine) / sum).store(add);
    total.store(lse, static_cast<int>(count));
  }

  const Gather& how_;
  const int64_t dim_, value_dim_, q_len_, k_len_, heads_, slots_;
  const Rows<const T> k_, v_;
  const int32_t* tokens_;
  const int64_t token_step_;
  const int64_t* edges_;
  const TileUnit unit_;
  Space<F>& mine_;
  int64_t pools_ = 0, tokens_loaded_ = 0;
  // Slots of the block after this one, and those whose tokens have been fetched.
  const int32_t *next_ = nullptr, *fetched_ = nullptr;
  Rows<const float> key_grains_{}, value_grains_{}, key_sums_{}, value_sums_{};
  std::vector<Rows<const T>> q_;
  std::vector<Rows<T>> out_;
  std::vector<float*> lse_;
};

}  // namespace

void merge_gathered(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& tokens, const at::Tensor& k_grain, const at::Tensor& v_grain,
                    const at::Tensor& k_sum, const at::Tensor& v_sum, const at::Tensor& edges,
                    at::Tensor out, at::Tensor lse, at::IntArrayRef places, const Gather& how) {
  by_own_types(q.scalar_type(), [&](auto in, auto factor) {
    for_each_place(places, 4, [&](at::IntArrayRef at) {
      Merger<decltype(in), decltype(factor)>(q, k, v, tokens, k_grain, v_grain, k_sum, v_sum, edges,
                                             out, lse, at[0], at[1], how)
          .run(at[2], at[3]);
    });
  });
}

}  // namespace longswift
