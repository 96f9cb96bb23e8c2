// Attention of windows: rectangles, each with the keys that its tiles see.
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

}  // namespace

void attend_tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out,
                  at::Tensor lse, at::IntArrayRef places, double scale) {
  const int64_t heads = q.size(1) / k.size(1);
  by_own_types(q.scalar_type(), [&](auto in, auto factor) {
    using Own = Tiles<decltype(in), decltype(factor)>;
    for_each_place(places, 11, [&](at::IntArrayRef at) {
      const Rectangle shape{at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10]};
      attend_rectangle(Own(q, k, v, out, lse, at[0], at[1], shape, static_cast<float>(scale)),
                       shape, heads, q.size(3), v.size(3));
    });
  });
}

}  // namespace longswift
