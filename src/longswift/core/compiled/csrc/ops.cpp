// How Python calls the kernels.
#include <torch/library.h>

#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

bool multiplies_like(const at::Tensor& like) {
  return multiplies(like.scalar_type());
}

Choice choice_of(at::IntArrayRef sizes, double scale, at::ArrayRef<double> radii, bool causal) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
          static_cast<float>(scale), static_cast<float>(radii[0]), static_cast<float>(radii[1]),
          causal};
}

void choose(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
            const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
            at::IntArrayRef places, at::IntArrayRef sizes, double scale, at::ArrayRef<double> radii,
            bool causal) {
  choose_by_bounds(q, k, band_lse, boxes, edges, tokens, places,
                   choice_of(sizes, scale, radii, causal));
}

void choose_tree(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                 const at::Tensor& top, at::TensorList levels, const at::Tensor& edges,
                 at::Tensor tokens, at::IntArrayRef places, at::IntArrayRef sizes, double scale,
                 at::ArrayRef<double> radii, bool causal, int64_t opened) {
  choose_by_tree(q, k, band_lse, top, levels, edges, tokens, places,
                 choice_of(sizes, scale, radii, causal), opened);
}

void choose_centroids(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                      const at::Tensor& edges, at::Tensor tokens, at::IntArrayRef places,
                      at::IntArrayRef sizes, double scale, bool causal, int64_t rows, int64_t far,
                      bool narrow, const at::Tensor& bytes, const at::Tensor& levels,
                      int64_t first) {
  choose_by_centroids(q, k, band_lse, edges, tokens, places,
                      choice_of(sizes, scale, {0.0, 0.0}, causal), rows, far, narrow,
                      {bytes, levels, first});
}

void choose_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                const at::Tensor& low, const at::Tensor& high, const at::Tensor& edges,
                at::Tensor tokens, at::IntArrayRef places, at::IntArrayRef sizes, double scale,
                at::ArrayRef<double> radii, bool causal, bool narrow) {
  choose_for_few(q, k, band_lse, low, high, edges, tokens, places,
                 choice_of(sizes, scale, radii, causal), narrow);
}

void choose_strict(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
                   const at::Tensor& boxes, const at::Tensor& edges, at::Tensor tokens,
                   at::Tensor since, at::IntArrayRef places, at::IntArrayRef sizes, double scale,
                   at::ArrayRef<double> radii) {
  choose_in_turn(q, k, band_lse, boxes, edges, tokens, since, places,
                 choice_of(sizes, scale, radii, true));
}

void merge(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& tokens,
           const at::Tensor& k_grain, const at::Tensor& v_grain, const at::Tensor& k_sum,
           const at::Tensor& v_sum, const at::Tensor& edges, at::Tensor out, at::Tensor lse,
           at::IntArrayRef places, at::IntArrayRef sizes, double scale, bool causal) {
  const Gather how{sizes[0], sizes[1], sizes[2], scale, causal};
  merge_gathered(q, k, v, tokens, k_grain, v_grain, k_sum, v_sum, edges, out, lse, places, how);
}

void band_gradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& lse, const at::Tensor& delta, const at::Tensor& d_out,
                    at::Tensor d_q, at::Tensor d_k, at::Tensor d_v, const at::Tensor& first,
                    const at::Tensor& end, at::IntArrayRef places, double scale) {
  add_band_gradients({q, k, v, lse, delta, d_out, d_q, d_k, d_v, static_cast<float>(scale)}, first,
                     end, places);
}

void merge_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& tokens, const at::Tensor& from, const at::Tensor& until,
                const at::Tensor& k_grain, const at::Tensor& v_grain, const at::Tensor& k_sum,
                const at::Tensor& v_sum, const at::Tensor& edges, at::Tensor out, at::Tensor lse,
                at::IntArrayRef places, at::IntArrayRef sizes, double scale, bool causal) {
  merge_by_row(q, k, v,
               {tokens, from, until, k_grain, v_grain, k_sum, v_sum, edges, sizes[0], sizes[1],
                sizes[2], causal},
               out, lse, places, scale);
}

void gathered_gradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& lse, const at::Tensor& delta, const at::Tensor& d_out,
                        at::Tensor d_q, at::Tensor d_k, at::Tensor d_v, const at::Tensor& tokens,
                        const at::Tensor& from, const at::Tensor& until, const at::Tensor& k_grain,
                        const at::Tensor& v_grain, const at::Tensor& k_sum, const at::Tensor& v_sum,
                        const at::Tensor& edges, at::Tensor d_k_grain, at::Tensor d_v_grain,
                        at::Tensor d_k_sum, at::Tensor d_v_sum, at::Tensor shares,
                        at::IntArrayRef places, at::IntArrayRef sizes, double scale, bool causal) {
  add_gathered_gradients({q, k, v, lse, delta, d_out, d_q, d_k, d_v, static_cast<float>(scale)},
                         {tokens, from, until, k_grain, v_grain, k_sum, v_sum, edges, sizes[0],
                          sizes[1], sizes[2], causal},
                         {d_k_grain, d_v_grain, d_k_sum, d_v_sum}, shares, places);
}

}  // namespace

}  // namespace longswift

TORCH_LIBRARY(longswift, m) {
  m.def("sum_groups(Tensor x, Tensor(a!) out, int size) -> ()");
  m.def("use_large_pages(Tensor(a!) x) -> ()");
  m.def("describe(Tensor k, Tensor(a!) boxes, int[] places, int key_block) -> ()");
  m.def(
      "choose(Tensor q, Tensor k, Tensor band_lse, Tensor boxes, Tensor edges, Tensor(a!) tokens, "
      "int[] places, int[] sizes, float scale, float[] radii, bool causal) -> ()");
  m.def(
      "choose_tree(Tensor q, Tensor k, Tensor band_lse, Tensor top, Tensor[] levels, Tensor edges, "
      "Tensor(a!) tokens, int[] places, int[] sizes, float scale, float[] radii, bool causal, "
      "int opened) -> ()");
  m.def(
      "choose_centroids(Tensor q, Tensor k, Tensor band_lse, Tensor edges, Tensor(a!) tokens, "
      "int[] places, int[] sizes, float scale, bool causal, int rows, int far, "
      "bool narrow, Tensor bytes, Tensor levels, int first) -> ()");
  m.def("multiplies_bytes() -> bool", longswift::multiplies_bytes);
  m.def("extents(Tensor k) -> Tensor");
  m.def(
      "find_levels(Tensor q, Tensor k, Tensor extents, Tensor edges, Tensor(a!) levels, int[] run, "
      "float scale, bool causal) -> ()");
  m.def("round_keys(Tensor k, Tensor(a!) bytes, int[] places) -> ()");
  m.def(
      "choose_few(Tensor q, Tensor k, Tensor band_lse, Tensor low, Tensor high, Tensor edges, "
      "Tensor(a!) tokens, int[] places, int[] sizes, float scale, float[] radii, bool causal, "
      "bool narrow) -> ()");
  m.def(
      "choose_strict(Tensor q, Tensor k, Tensor band_lse, Tensor boxes, Tensor edges, "
      "Tensor(a!) tokens, Tensor(b!) since, int[] places, int[] sizes, float scale, float[] radii) "
      "-> ()");
  m.def(
      "merge(Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor k_grain, Tensor v_grain, "
      "Tensor k_sum, Tensor v_sum, Tensor edges, Tensor(a!) out, Tensor(b!) lse, int[] places, "
      "int[] sizes, float scale, bool causal) -> ()");
  m.def(
      "tiles(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, int[] places, "
      "float scale) -> ()");
  m.def(
      "merge_by_row(Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor since, Tensor until, "
      "Tensor k_grain, Tensor v_grain, Tensor k_sum, Tensor v_sum, Tensor edges, Tensor(a!) out, "
      "Tensor(b!) lse, int[] places, int[] sizes, float scale, bool causal) -> ()");
  m.def("gradient_square() -> int", longswift::gradient_square);
  m.def(
      "band_gradients(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor d_out, "
      "Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!) d_v, Tensor first, Tensor end, int[] places, "
      "float scale) -> ()");
  m.def(
      "gathered_gradients(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor d_out, "
      "Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!) d_v, Tensor tokens, Tensor since, Tensor until, "
      "Tensor k_grain, Tensor v_grain, Tensor k_sum, Tensor v_sum, Tensor edges, "
      "Tensor(d!) d_k_grain, Tensor(e!) d_v_grain, Tensor(f!) d_k_sum, Tensor(g!) d_v_sum, "
      "Tensor(h!) shares, int[] places, int[] sizes, float scale, bool causal) -> ()");
  m.def(
      "whole(Tensor q, Tensor k, Tensor v, float? scale, bool causal) -> (Tensor, Tensor, int)");
  m.def("multiplies(Tensor like) -> bool");
  m.def("first_not_finite(Tensor[] tensors) -> int");
}

TORCH_LIBRARY_IMPL(longswift, CPU, m) {
  m.impl("sum_groups", longswift::sum_groups);
  m.impl("use_large_pages", longswift::use_large_pages);
  m.impl("describe", longswift::describe_boxes);
  m.impl("choose", longswift::choose);
  m.impl("choose_tree", longswift::choose_tree);
  m.impl("choose_centroids", longswift::choose_centroids);
  m.impl("extents", longswift::extents_of);
  m.impl("find_levels", longswift::find_levels);
  m.impl("round_keys", longswift::round_keys);
  m.impl("choose_few", longswift::choose_few);
  m.impl("choose_strict", longswift::choose_strict);
  m.impl("merge", longswift::merge);
  m.impl("tiles", longswift::attend_tiles);
  m.impl("band_gradients", longswift::band_gradients);
  m.impl("merge_by_row", longswift::merge_rows);
  m.impl("gathered_gradients", longswift::gathered_gradients);
  m.impl("whole", longswift::attend_whole);
  m.impl("multiplies", longswift::multiplies_like);
  m.impl("first_not_finite", longswift::first_not_finite);
}
