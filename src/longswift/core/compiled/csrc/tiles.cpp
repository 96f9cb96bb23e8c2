// Attention of windows: rectangles, each with the keys that its tiles see.
#include "few_rows.h"
#include "tiles.h"

namespace longswift {

namespace {

template <typename T, typename F>
void attend_rectangle(Tiles<T, F>&& tiles, const Rectangle& shape, int64_t heads, int64_t dim,
                      int64_t value_dim) {
  static thread_local Buffer<F> keys, values;
  const int64_t padded = round_up(shape.width, kWidths);
  const Packed<F> packed{keys.get(padded * dim), values.get(padded * value_dim)};
  for (int64_t n = 0; n < shape.count; ++n) {
    for (int64_t p = 0; p < shape.width; p += kPanel) {
      tiles.pack(shape.key + n * shape.step, p, packed);
    }
    for (int64_t first = 0; first < shape.rows; first += kRows) {
      const int64_t rows = std::min(kRows, shape.rows - first);
      for (int64_t g = 0; g < heads; ++g) {
        tiles.attend(packed, g, shape.row + n * shape.step, first, rows);
      }
    }
  }
}

// A single row of every head of a group.
template <typename T>
void attend_row(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                const at::Tensor& lse, int64_t batch, int64_t head, const Rectangle& shape,
                float scale) {
  const int64_t heads = q.size(1) / k.size(1), first_head = head * heads;
  FewRows rows(heads, q.size(3), v.size(3), scale);
  for (int64_t g = 0; g < heads; ++g) {
    rows.set(g, rows_of<const T>(q, batch, first_head + g).row(shape.row));
  }
  const int64_t first = std::max<int64_t>(0, shape.shift - shape.behind);
  const int64_t end = std::min(shape.width, shape.shift + shape.ahead + 1);
  const auto keys = rows_of<const T>(k, batch, head), values = rows_of<const T>(v, batch, head);
  const int64_t key = shape.key + first;
  rows.add<T>(
      end - first, [&](int64_t i) { return keys.row(key + i); },
      [&](int64_t i) { return values.row(key + i); });
  for (int64_t g = 0; g < heads; ++g) {
    const int64_t own = first_head + g;
    rows.store(g, rows_of<T>(out, batch, own).row(shape.row),
               rows_of<float>(lse.unsqueeze(3), batch, own).row(shape.row));
  }
}

}  // namespace

void attend_tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out,
                  at::Tensor lse, at::IntArrayRef places, double scale) {
  const int64_t heads = q.size(1) / k.size(1);
  by_own_types(q.scalar_type(), [&](auto in, auto factor) {
    using Own = Tiles<decltype(in), decltype(factor)>;
    for_each_place(places, 11, [&](at::IntArrayRef at) {
      const Rectangle shape{at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10]};
      if (shape.rows == 1 && shape.count == 1 && heads <= kFewRows) {
        attend_row<decltype(in)>(q, k, v, out, lse, at[0], at[1], shape, static_cast<float>(scale));
        return;
      }
      attend_rectangle(Own(q, k, v, out, lse, at[0], at[1], shape, static_cast<float>(scale)),
                       shape, heads, q.size(3), v.size(3));
    });
  });
}

}  // namespace longswift
