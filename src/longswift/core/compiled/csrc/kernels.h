// The kernels. What they take is checked in Python; `places` lists pieces of work, some numbers
// each: a batch row and a KV head, then what the comment says.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
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
  bool causal, narrow;
};

// `count` rectangles, each `step` further along queries and keys: rows [row, +rows) meet keys
// [key, +width). The first row sits `shift` after the first key; a row sees `behind` keys before
// itself and `ahead` after.
struct Rectangle {
  int64_t row, key, step, count, rows, width, shift, behind, ahead;
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
                         const Choice& choice, int64_t rows, int64_t far, bool narrow);

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
                  at::Tensor lse, at::IntArrayRef places, double scale, bool narrow);

// Every query sees every key, or every key up to its own when causal. The output, laid out by token
// like PyTorch's own, the log-sum-exp, and whether the inputs are finite (if not, the others are of no
// use), or -1 and neither of them for inputs that it does not take. May be given any tensors.
std::tuple<at::Tensor, at::Tensor, int64_t> attend_whole(const at::Tensor& q, const at::Tensor& k,
                                                         const at::Tensor& v, double scale,
                                                         bool causal);

// The index of the first of some `[B, H, L, D]` that holds NaN or infinity, or -1; the last
// dimension is contiguous.
int64_t first_not_finite(at::TensorList tensors);

}  // namespace longswift
