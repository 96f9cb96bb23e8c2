// What blocks of keys are described by: boxes, against which queries are bounded, and sums.
#include "common.h"
#include "kernels.h"

namespace longswift {

namespace {

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
  std::fill(out, out + width, 0.0f);
  float line[width];
  for (int64_t i = first; i < first + count; ++i) {
    convert(line, x.row(i), width);
    for (int64_t d = 0; d < width; ++d) {
      out[d] += line[d];
    }
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

void describe_boxes(const at::Tensor& k, at::Tensor boxes, at::IntArrayRef places,
                    int64_t key_block) {
  by_types(k.scalar_type(), boxes.scalar_type() != at::kFloat, [&](auto in, auto factor) {
    for_each_place(places, 3, [&](at::IntArrayRef at) {
      describe_keys<decltype(in), decltype(factor)>(k, boxes, at[0], at[1], at[2], key_block);
    });
  });
}

}  // namespace longswift
