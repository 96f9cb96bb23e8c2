// The kernels. What they take is checked in Python; `places` lists pieces of work, some numbers
// each: a batch row and a KV head, then what the comment says.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <limits>
#include <tuple>

namespace longswift {

struct Choice {
  int64_t block, key_block, row_group, proposed, budget, sinks, sink_blocks;
  float scale, key_radius, row_radius;
  bool causal;

  // Of a channel of a box around keys, to meet groups of rows.
  int64_t numbers() const { return row_radius > 0.0f ? 3 : 2; }
};

struct Gather {
  int64_t block, pool, grain;
  double scale;
  bool causal;
};

// `count` rectangles, each `step` further along queries and keys: rows [row, +rows) meet keys
// [key, +width). The first row sits `shift` after the first key; a row sees `behind` keys before
// itself and `ahead` after.
struct Rectangle {
  int64_t row, key, step, count, rows, width, shift, behind, ahead;
};

// No level of a step: factors stay what they are.
constexpr int32_t kNoBytes = std::numeric_limits<int32_t>::min();

// Keys `[B, Hkv, L, *]` as bytes, and the level of their step for every block of queries from `first`
// on, int32 `[B, Hkv, count]`; no levels where there are no bytes.
struct Bytes {
  at::Tensor keys, levels;
  int64_t first;

  int32_t level(int64_t batch, int64_t head, int64_t block) const {
    if (levels.numel() == 0) {
      return kNoBytes;
    }
    const int64_t at = (batch * levels.size(1) + head) * levels.size(2) + block - first;
    return levels.data_ptr<int32_t>()[at];
  }
};

// Inputs of the forward pass, its log-sum-exp (infinite for rows that saw nothing), `delta`, the sum of
// the output times its gradient less that of the log-sum-exp, both fp32 and contiguous, and fp32
// accumulators.
struct Differentiated {
  const at::Tensor &q, &k, &v, &lse, &delta, &d_out;
  at::Tensor &d_q, &d_k, &d_v;
  float scale;
};

// Sums of every `size` rows of `x [B, H, L, D]`, fp32 `[B, H, L / size, D]`.
void sum_groups(const at::Tensor& x, at::Tensor out, int64_t size);

// For memory that nothing has been written to yet, and that is read here and there.
void use_large_pages(at::Tensor x);

// A panel of boxes.
void describe_boxes(const at::Tensor& k, at::Tensor boxes, at::IntArrayRef places,
                    int64_t key_block);

// The first of some complete blocks of queries, how many, the first row.
void choose_by_bounds(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                      const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                      at::IntArrayRef places, const Choice& choice);

// The same by a tree of boxes: `top [B * Hkv, panels, numbers * D, width]` of the level at which it is
// entered, `levels [B * Hkv, nodes, numbers * D, branch]` of those below, blocks of keys first.
void choose_by_tree(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& top, at::TensorList levels, const at::Tensor& edges,
                    at::Tensor tokens, at::IntArrayRef places, const Choice& choice,
                    int64_t opened);

// Some blocks of queries by centroids of at most `rows` rows, more of them beyond `far`, against
// single keys: their first, how many, the first row, rows of a block.
void choose_by_centroids(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                         const at::Tensor& edges, at::Tensor tokens, at::IntArrayRef places,
                         const Choice& choice, int64_t rows, int64_t far, bool narrow,
                         const Bytes& bytes);

// Whether bytes can be multiplied here.
bool multiplies_bytes();

// For every 64 keys, as far as there are as many, of all up to them: the largest absolute number, every
// channel's sum, every channel's sum of squares, fp32 `[B, Hkv, L / 64, 1 + 2 * D]`.
at::Tensor extents_of(const at::Tensor& k);

// Levels `[B, Hkv, count]` of a run of blocks: its first block, first row, rows of a block.
void find_levels(const at::Tensor& q, const at::Tensor& k, const at::Tensor& extents,
                 const at::Tensor& edges, at::Tensor levels, at::IntArrayRef run, double scale,
                 bool causal);

// The first of some keys, their end, the level of their step.
void round_keys(const at::Tensor& k, at::Tensor bytes, at::IntArrayRef places);

// A block of queries, its first row, how many rows.
void choose_for_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& low, const at::Tensor& high, const at::Tensor& edges,
                    at::Tensor tokens, at::IntArrayRef places, const Choice& choice, bool narrow);

// A block of queries, its first row, how many rows, the position of the first among the keys.
void choose_in_turn(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                    at::Tensor since, at::IntArrayRef places, const Choice& choice);

// The first of some blocks of queries, how many.
void merge_gathered(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& tokens, const at::Tensor& k_grain, const at::Tensor& v_grain,
                    const at::Tensor& k_sum, const at::Tensor& v_sum, const at::Tensor& edges,
                    at::Tensor out, at::Tensor lse, at::IntArrayRef places, const Gather& how);

// The fields of a rectangle.
void attend_tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out,
                  at::Tensor lse, at::IntArrayRef places, double scale);

// Rows and keys of a square.
int64_t gradient_square();

// Gradients of bands in which a row sees keys [first, end), both int32 `[Hkv, Lq]` that never fall. The
// first row and the first key of a square; squares of one call share neither.
void add_band_gradients(const Differentiated& of, const at::Tensor& first, const at::Tensor& end,
                        at::IntArrayRef places);

// What blocks of queries see outside their bands, each row on its own: tokens `[1 or B, Hkv, N, C]`,
// -1 for none, seen by queries at positions [from, until), int32 and contiguous, the last two perhaps
// empty; sums of grains and pools as in `merge_gathered`, and the edges of the bands.
struct Outside {
  const at::Tensor &tokens, &from, &until, &k_grain, &v_grain, &k_sum, &v_sum, &edges;
  int64_t block, pool, grain;
  bool causal;
};

// Merges that into the result of the bands, `lse` with whole rows: the first of some blocks, how many.
void merge_by_row(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const Outside& outside, at::Tensor out, at::Tensor lse, at::IntArrayRef places,
                  double scale);

// Accumulators like those sums.
struct PoolGradients {
  at::Tensor &d_k_grain, &d_v_grain, &d_k_sum, &d_v_sum;
};

// The first of some blocks of queries, how many; every place another head. `shares` is memory, fp32
// `[places * blocks, C and columns, D + Dv]`.
void add_gathered_gradients(const Differentiated& of, const Outside& outside,
                            const PoolGradients& pools, at::Tensor shares, at::IntArrayRef places);

// Every query sees every key, or every key up to its own when causal. The output, laid out by token
// like PyTorch's own, the log-sum-exp, and whether the inputs are finite (if not, the others are of no
// use), or -1 and neither of them for inputs that it does not take. May be given any tensors. Scores
// are divided by the root of the head's width where no scale is given.
std::tuple<at::Tensor, at::Tensor, int64_t> attend_whole(const at::Tensor& q, const at::Tensor& k,
                                                         const at::Tensor& v,
                                                         std::optional<double> scale, bool causal);

// The index of the first of some `[B, H, L, D]` that holds NaN or infinity, or -1; the last
// dimension is contiguous.
int64_t first_not_finite(at::TensorList tensors);

}  // namespace longswift
