// Key tokens by bounds for strictly causal attention: a row sees what it and earlier rows asked for.
#include "best.h"
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

constexpr int64_t kWidth = 64;

// Where exponentials are nothing.
constexpr float kNothing = -87.336f;
// Rows that are scored at once: as many as leave their scores in a near cache.
constexpr int64_t kTogether = 32;

// A budget that rows fill in turn.
class Turns {
 public:
  // Nothing of `keys` is taken yet.
  void begin(int64_t keys) {
    keys_ = keys;
    std::fill_n(free_.get(keys), keys, 0.0f);
    given_ = count_ = 0;
  }

  // Row 0 takes a quarter of the budget, the rest is spread evenly over the rows of a complete block;
  // each row takes the keys it wants most among those not taken yet, if it wants them more than
  // `least`. `wanted` is [rows, keys], a row every `step` numbers, of the rows from `first` on.
  void take(const float* wanted, int64_t step, const float* least, int64_t first, int64_t rows,
            int64_t budget, int64_t block, int32_t* index, int32_t* owner) {
    float* free = free_.get(keys_);
    const int64_t head_start = std::max<int64_t>(1, budget / 4);
    for (int64_t r = first; r < first + rows; ++r, wanted += step) {
      const int64_t due = head_start + (budget - head_start) * (r + 1) / block;
      const int64_t quota = std::min(due - given_, keys_);
      given_ = due;
      if (quota <= 0) {
        continue;
      }
      const int64_t taken = best(wanted, free, least[r - first], keys_, quota, index + count_);
      for (int64_t i = count_; i < count_ + taken; ++i) {
        free[index[i]] = kHidden;
        owner[i] = static_cast<int32_t>(r);
      }
      count_ += taken;
    }
  }

  // How many were taken.
  int64_t count() const { return count_; }

 private:
  // Rows after the first take few keys, which are kept in order.
  static constexpr int64_t kFew = 8;

  int64_t best(const float* wanted, const float* free, float least, int64_t keys, int64_t quota,
               int32_t* index) {
    if (quota > kFew) {
      float* left = left_.get(keys);
      for (int64_t k = 0; k < keys; ++k) {
        const float x = wanted[k] + free[k];
        left[k] = x > least ? x : kHidden;
      }
      return order_.find(left, keys, quota, index);
    }
    float values[kFew];
    int64_t count = 0;
    // What a key must exceed to be among the best so far.
    float limit = least;
    int64_t k = 0;
    for (; k + kLanes <= keys; k += kLanes) {
      const Vec x = Vec::loadu(wanted + k) + Vec::loadu(free + k);
      if (which_above(x, Vec(limit)) != 0) {
        for (int64_t i = k; i < k + kLanes; ++i) {
          limit = insert(wanted[i] + free[i], i, quota, limit, values, index, &count);
        }
      }
    }
    for (; k < keys; ++k) {
      limit = insert(wanted[k] + free[k], k, quota, limit, values, index, &count);
    }
    return count;
  }

  static float insert(float x, int64_t key, int64_t quota, float limit, float* values,
                      int32_t* index, int64_t* count) {
    if (!(x > limit)) {
      return limit;
    }
    int64_t place = *count < quota ? (*count)++ : quota - 1;
    for (; place > 0 && values[place - 1] < x; --place) {
      values[place] = values[place - 1];
      index[place] = index[place - 1];
    }
    values[place] = x;
    index[place] = static_cast<int32_t>(key);
    return *count < quota ? limit : values[quota - 1];
  }

  Buffer<float> free_, left_;
  Best order_;
  int64_t keys_ = 0, given_ = 0, count_ = 0;
};

template <typename F>
struct Space {
  Buffer<F> rows, wide, keys, packed;
  Buffer<float> scores, wanted;
  Buffer<int32_t> blocks, block_owner, tokens, token_owner, index, owner;
  Turns turns;
};

template <typename T, typename F>
class Strict {
 public:
  Strict(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
         const at::Tensor& boxes, const at::Tensor& edges, at::Tensor& tokens, at::Tensor& since,
         int64_t batch, int64_t head, const Choice& choice)
      : choice_(choice),
        dim_(q.size(3)),
        heads_(q.size(1) / k.size(1)),
        blocks_(k.size(2) / choice.key_block),
        k_(rows_of<const T>(k, batch, head)),
        panels_(boxes.data_ptr<F>() + (batch * k.size(1) + head) * boxes.stride(0)),
        edges_(edges.data_ptr<int64_t>() + head * edges.stride(0)),
        tokens_(rows_of<int32_t>(tokens, batch, head)),
        since_(rows_of<int32_t>(since, batch, head)),
        mine_(of_thread<Space<F>>()) {
    for (int64_t g = 0; g < heads_; ++g) {
      q_.push_back(rows_of<const T>(q, batch, head * heads_ + g));
      lse_.push_back(band_lse.data_ptr<float>() + batch * band_lse.stride(0) +
                     (head * heads_ + g) * band_lse.stride(1));
    }
  }

  // `rows` rows of a block, the first of which is `row`, at `position` among the keys.
  void run(int64_t block, int64_t row, int64_t rows, int64_t position) {
    const int64_t candidates = std::min(edges_[2 * block] / choice_.key_block, blocks_);
    if (candidates == 0) {
      return;
    }
    const int64_t count = propose(row, rows, candidates);
    const int64_t taken = choose(row, rows, count);
    const int32_t *index = mine_.index.get(0), *owner = mine_.owner.get(0);
    const int32_t* tokens = mine_.tokens.get(0);
    for (int64_t i = 0; i < taken; ++i) {
      tokens_.row(block)[i] = tokens[index[i]];
      since_.row(block)[i] = static_cast<int32_t>(position + owner[i]);
    }
  }

 private:
  // Blocks of keys for every row in turn; writes their tokens and the rows that asked for them.
  int64_t propose(int64_t row, int64_t rows, int64_t candidates) {
    const int64_t width = round_up(candidates, kWidth), step = row_step(width), inner = 2 * dim_;
    float* scores = mine_.scores.get(kTogether * step);
    float* wanted = heads_ == 1 ? scores : mine_.wanted.get(kTogether * step);
    float least[kTogether];
    const int64_t sinks = std::min(choice_.sink_blocks, candidates);
    int32_t* blocks = mine_.blocks.get(sinks + choice_.proposed);
    int32_t* owner = mine_.block_owner.get(sinks + choice_.proposed);
    // Sinks are seen by every row, and so belong to every row's sum.
    for (int64_t j = 0; j < sinks; ++j) {
      blocks[j] = static_cast<int32_t>(j);
      owner[j] = 0;
    }
    mine_.turns.begin(candidates);
    for (int64_t first = 0; first < rows; first += kTogether) {
      const int64_t some = std::min(kTogether, rows - first);
      for (int64_t g = 0; g < heads_; ++g) {
        const F* factors = describe(g, row + first, some);
        for (int64_t column = 0; column < width; column += kWidth) {
          multiply<F>(some, kWidth, inner, factors, inner, panels_ + column * inner, kWidth,
                      scores + column, step);
        }
        for (int64_t r = 0; r < some; ++r) {
          float* of_row = scores + r * step;
          want(g, of_row, candidates, max_over(of_row, candidates), 0.0f, wanted + r * step,
               least + r);
        }
      }
      for (int64_t r = 0; r < some; ++r) {
        std::fill(wanted + r * step, wanted + r * step + sinks, kHidden);
      }
      mine_.turns.take(wanted, step, least, first, some, choice_.proposed, choice_.block,
                       blocks + sinks, owner + sinks);
    }
    const int64_t count = sinks + mine_.turns.count();
    const int64_t size = choice_.key_block;
    int32_t* tokens = mine_.tokens.get(count * size);
    int32_t* token_owner = mine_.token_owner.get(count * size);
    for (int64_t i = 0; i < count * size; ++i) {
      tokens[i] = static_cast<int32_t>(blocks[i / size] * size + i % size);
      token_owner[i] = owner[i / size];
    }
    return count * size;
  }

  // What rows meet the largest and the smallest keys of a block with, [rows, 2 * dim].
  const F* describe(int64_t g, int64_t row, int64_t rows) {
    F* out = mine_.rows.get(rows * 2 * dim_);
    float line[2 * dim_];
    for (int64_t r = 0; r < rows; ++r) {
      bound_factors(q_[g].row(row + r), dim_, choice_.scale, choice_.key_radius, line,
                    line + dim_);
      convert(out + r * 2 * dim_, line, 2 * dim_);
    }
    return out;
  }

  // Tokens of the proposed blocks for every row in turn, by their exact probabilities.
  int64_t choose(int64_t row, int64_t rows, int64_t count) {
    const int32_t *tokens = mine_.tokens.get(0), *asked = mine_.token_owner.get(0);
    const int64_t width = round_up(count, kWidth), step = row_step(width);
    F* keys = mine_.keys.get(width * dim_);
    for (int64_t t = 0; t < count; ++t) {
      convert(keys + t * dim_, k_.row(tokens[t]), dim_);
    }
    std::memset(static_cast<void*>(keys + count * dim_), 0, (width - count) * dim_ * sizeof(F));
    F* packed = mine_.packed.get(width * dim_);
    for (int64_t p = 0; p < width; p += kWidth) {
      pack_transposed<F>(keys + p * dim_, dim_, kWidth, dim_, packed + p * dim_, kWidth);
    }
    float* scores = mine_.scores.get(kTogether * step);
    float* wanted = heads_ == 1 ? scores : mine_.wanted.get(kTogether * step);
    float least[kTogether];
    int32_t *index = mine_.index.get(choice_.budget), *owner = mine_.owner.get(choice_.budget);
    mine_.turns.begin(count);
    for (int64_t first = 0; first < rows; first += kTogether) {
      const int64_t some = std::min(kTogether, rows - first);
      for (int64_t g = 0; g < heads_; ++g) {
        int64_t q_step;
        const F* queries = factors<T, F>(q_[g], row + first, some, dim_, mine_.wide, &q_step);
        for (int64_t p = 0; p < width; p += kWidth) {
          multiply<F>(some, kWidth, dim_, queries, q_step, packed + p * dim_, kWidth, scores + p,
                      step);
        }
        for (int64_t r = 0; r < some; ++r) {
          float* of_row = scores + r * step;
          for (int64_t t = 0; t < count; ++t) {
            of_row[t] = asked[t] <= first + r ? of_row[t] * choice_.scale : kHidden;
          }
          const float band = lse_[g][row + first + r];
          const float top = std::max(band, max_over(of_row, count));
          want(g, of_row, count, top, std::exp(band - top), wanted + r * step, least + r);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        if (tokens[t] < choice_.sinks) {
          for (int64_t r = 0; r < some; ++r) {
            wanted[r * step + t] = kHidden;
          }
        }
      }
      mine_.turns.take(wanted, step, least, first, some, choice_.budget, choice_.block, index, owner);
    }
    return mine_.turns.count();
  }

  // What a row of a head wants: of a single head scores are in the order of their probabilities, of
  // several the largest probability counts.
  void want(int64_t g, float* scores, int64_t n, float top, float more, float* wanted,
            float* least) const {
    if (heads_ == 1) {
      *least = top + kNothing;
      return;
    }
    *least = 0.0f;
    raise(scores, n, top, more, wanted, g > 0);
  }

  // wanted = exp(scores - top) / (their sum + more), or the maximum of that and what was `wanted`.
  static void raise(float* scores, int64_t n, float top, float more, float* wanted, bool again) {
    Vec total(0.0f);
    const Vec shift(top);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const Vec x = (Vec::loadu(scores + i) - shift).exp_u20();
      x.store(scores + i);
      total += x;
    }
    float sum = sum_of(total) + more;
    for (int64_t j = i; j < n; ++j) {
      scores[j] = std::exp(scores[j] - top);
      sum += scores[j];
    }
    const Vec by(1.0f / sum);
    for (i = 0; i + kLanes <= n; i += kLanes) {
      const Vec x = Vec::loadu(scores + i) * by;
      (again ? larger(Vec::loadu(wanted + i), x) : x).store(wanted + i);
    }
    for (; i < n; ++i) {
      wanted[i] = std::max(again ? wanted[i] : 0.0f, scores[i] / sum);
    }
  }

  const Choice& choice_;
  const int64_t dim_, heads_, blocks_;
  const Rows<const T> k_;
  const F* panels_;
  const int64_t* edges_;
  const Rows<int32_t> tokens_, since_;
  Space<F>& mine_;
  std::vector<Rows<const T>> q_;
  std::vector<const float*> lse_;
};

}  // namespace

void choose_in_turn(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                    at::Tensor since, at::IntArrayRef places, const Choice& choice) {
  TORCH_CHECK(boxes.size(3) == kWidth, "expected panels of ", kWidth, ", got ", boxes.size(3));
  by_ranked_types(q.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    for_each_place(places, 6, [&](at::IntArrayRef at) {
      Strict<decltype(in), decltype(factor)>(q, k, band_lse, boxes, edges, tokens, since, at[0],
                                             at[1], choice)
          .run(at[2], at[3], at[4], at[5]);
    });
  });
}

}  // namespace longswift
