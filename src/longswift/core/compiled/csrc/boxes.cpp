// What blocks of keys are described by: boxes, against which queries are bounded, and sums.
#include <sys/mman.h>

#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

// Smallest and largest number of every channel of rows [first, end).
template <typename T>
void extremes(const Rows<const T>& rows, int64_t first, int64_t end, int64_t dim, float* low,
              float* high) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t some = std::min(kLanes, dim - d);
    Vec bottom(-kHidden), top(kHidden);
    for (int64_t i = first; i < end; ++i) {
      const Vec x = floats_at(rows.row(i) + d, some);
      bottom = at::vec::minimum(bottom, x);
      top = larger(top, x);
    }
    bottom.store(low + d, some);
    top.store(high + d, some);
  }
}

// Boxes around blocks of keys, in panels: centre, radius and absolute centre, or, in panels of two
// times the channels, the largest and the smallest.
template <typename T, typename F>
void describe_keys(const at::Tensor& k, at::Tensor& boxes, int64_t batch, int64_t head,
                   int64_t panel, int64_t key_block) {
  const int64_t dim = k.size(3), k_len = k.size(2), width = boxes.size(3);
  const int64_t inner = boxes.size(2);
  const auto keys = rows_of<const T>(k, batch, head);
  F* out = boxes.data_ptr<F>() + (batch * k.size(1) + head) * boxes.stride(0) +
      panel * boxes.stride(1);
  static thread_local Buffer<F> lines;
  F* line = lines.get(width * inner);
  float low[dim], high[dim], box[3 * dim];
  for (int64_t j = 0; j < width; ++j) {
    const int64_t first = (panel * width + j) * key_block;
    const int64_t end = std::min(first + key_block, k_len);
    if (first >= end) {
      std::memset(static_cast<void*>(line + j * inner), 0, inner * sizeof(F));
      continue;
    }
    extremes(keys, first, end, dim, low, high);
    if (inner == 2 * dim) {
      convert(line + j * inner, high, dim);
      convert(line + j * inner + dim, low, dim);
      continue;
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

template <typename T>
void sum_rows(const Rows<const T>& x, int64_t first, int64_t count, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t some = std::min(kLanes, width - d);
    Vec sum(0.0f);
    for (int64_t i = first; i < first + count; ++i) {
      sum += floats_at(x.row(i) + d, some);
    }
    sum.store(out + d, some);
  }
}

}  // namespace

void sum_groups(const at::Tensor& x, at::Tensor out, int64_t size) {
  const int64_t heads = x.size(1), groups = out.size(2), width = x.size(3);
  by_types(x.scalar_type(), false, [&](auto in, auto) {
    using T = decltype(in);
    at::parallel_for(0, x.size(0) * heads * groups, 16, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t batch = i / groups / heads, head = i / groups % heads, group = i % groups;
        sum_rows(rows_of<const T>(x, batch, head), group * size, size, width,
                 rows_of<float>(out, batch, head).row(group));
      }
    });
  });
}

void use_large_pages(at::Tensor x) {
  constexpr uintptr_t page = 1 << 21;
  const auto start = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (start + page - 1) / page * page, end = (start + x.nbytes()) / page * page;
  if (first < end) {
    // Advice: without it everything works, slower.
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
}

void describe_boxes(const at::Tensor& k, at::Tensor boxes, at::IntArrayRef places,
                    int64_t key_block) {
  by_ranked_types(k.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    for_each_place(places, 3, [&](at::IntArrayRef at) {
      describe_keys<decltype(in), decltype(factor)>(k, boxes, at[0], at[1], at[2], key_block);
    });
  });
}

}  // namespace longswift
