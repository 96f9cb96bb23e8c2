// The kernels, one head of one batch row a call; what they take is checked in Python.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace longswift {

struct Choice {
  int64_t block, key_block, row_group, proposed, budget, sinks, sink_blocks;
  float scale, key_radius, row_radius;
  bool causal;
};

void describe_boxes(const at::Tensor& k, at::Tensor boxes, int64_t batch, int64_t head,
                    int64_t panel, int64_t key_block);

void choose_by_bounds(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                      const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                      int64_t batch, int64_t head, int64_t first, int64_t count, int64_t row,
                      const Choice& choice);

void choose_for_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                    const at::Tensor& low, const at::Tensor& high, const at::Tensor& edges,
                    at::Tensor tokens, int64_t batch, int64_t head, int64_t block, int64_t row,
                    int64_t rows, const Choice& choice, bool narrow);

struct Gather {
  int64_t block, pool, grain;
  double scale;
  bool causal, narrow;
};

void merge_gathered(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& tokens, const at::Tensor& k_grain, const at::Tensor& v_grain,
                    const at::Tensor& k_sum, const at::Tensor& v_sum, const at::Tensor& edges,
                    at::Tensor out, at::Tensor lse, int64_t batch, int64_t head, int64_t first,
                    int64_t count, const Gather& how);

// `count` rectangles, each `step` further along queries and keys: rows [row, +rows) meet keys
// [key, +width). The first row sits `shift` after the first key; a row sees `behind` keys before
// itself and `ahead` after.
struct Rectangle {
  int64_t row, key, step, count, rows, width, shift, behind, ahead;
};

void attend_tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out,
                  at::Tensor lse, int64_t batch, int64_t head, const Rectangle& shape, double scale,
                  bool narrow);

bool all_finite(const at::Tensor& x);

}  // namespace longswift
