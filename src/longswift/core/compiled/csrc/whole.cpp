// Attention of queries that see every key, or every key up to their own. NaN and infinity in the
// inputs are found where these pass through the cache anyway.
#include "few_rows.h"
#include "finite.h"
#include "tiles.h"

#include <ATen/EmptyTensor.h>

#include <thread>

namespace longswift {

namespace {

// Bytes of packed keys and values at once, if they are those of more than one head.
constexpr int64_t kKept = 8 << 20;
// Keys of a head that one thread packs and reads: for another they would have to change caches.
constexpr int64_t kAlone = 512;
// Keys beyond which PyTorch's kernel is as fast, unless a unit for bf16 multiplies, or MKL leaves half of the
// processor idle, and a thread does not keep the memory of packed ones.
constexpr int64_t kMost = 8192;
// Scores of a call, which nothing interrupts: some tenths of a second.
constexpr int64_t kScores = int64_t{1} << 31;
// Query rows for which it is worth while to pack the keys; products of 16 bits are cheap, even if most of
// their rows are nobody's.
constexpr int64_t kFewest = 24;
constexpr int64_t kFewestNarrow = 9;
// Those of a group beyond `kMost` keys, which are packed into fresh memory.
constexpr int64_t kFewestOfMany = 96;
constexpr int64_t kFewestOfManyNarrow = 64;
// Keys that few rows meet in one piece.
constexpr int64_t kPiece = 1024;
// Farther than any key.
constexpr int64_t kFar = int64_t{1} << 40;

// Whether rows are so few that keys are read where they lie.
bool are_few(const at::Tensor& q, const at::Tensor& k) {
  const bool narrow = multiplies(q.scalar_type());
  const int64_t rows = q.size(2);
  if (k.size(2) > kMost) {
    return rows * (q.size(1) / k.size(1)) < (narrow ? kFewestOfManyNarrow : kFewestOfMany);
  }
  // A short text on its own is packed: the diagonal hides half of it.
  return rows == 1 || (k.size(2) >= 2 * rows && rows < (narrow ? kFewestNarrow : kFewest));
}

template <typename T, typename F>
class Whole {
 public:
  Whole(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
        const at::Tensor& lse, float scale, bool causal)
      : q_(q),
        k_(k),
        v_(v),
        out_(out),
        lse_(lse),
        scale_(scale),
        queries_(q.size(2)),
        keys_(k.size(2)),
        kv_heads_(k.size(1)),
        groups_(q.size(1) / k.size(1)),
        size_(round_up(keys_, kWidths) * (q.size(3) + v.size(3))),
        tall_(height(keys_)),
        shape_{0, 0, 0, 1, queries_, keys_, keys_ - queries_, kFar, causal ? 0 : kFar} {}

  // Whether all inputs are finite; if they are not, nothing else is of use.
  bool run() {
    const int64_t heads = q_.size(0) * kv_heads_, threads = at::get_num_threads();
    if (are_few(q_, k_)) {
      attend_few(heads);
      return finite_;
    }
    if (keys_ <= kAlone && heads % threads == 0) {
      // The same heads every time, whose results lie in the thread's own cache.
      at::parallel_for(0, heads, heads / threads, [&](int64_t first, int64_t end) {
        for (int64_t head = first; head < end; ++head) {
          attend_head(head);
        }
        at::native::cpublas::brgemm_release();
      });
      return finite_;
    }
    const int64_t some = std::clamp<int64_t>(kKept / (size_ * sizeof(F)), 1, heads);
    // What many keys need is given back.
    Buffer<F> many;
    F* memory = (keys_ > kMost ? many : buffer()).get(some * size_);
    for (int64_t first = 0; first < heads && finite_; first += some) {
      attend_heads(first, std::min(some, heads - first), memory);
    }
    return finite_;
  }

 private:
  // Rows of a block: few where most blocks are cut by the diagonal, fewer where products are dear.
  static int64_t height(int64_t keys) {
    if (keys > kAlone) {
      return kRows;
    }
    return std::is_same_v<F, float> && keys <= kAlone / 2 ? kRows / 4 : kRows / 2;
  }

  static Buffer<F>& buffer() {
    static thread_local Buffer<F> mine;
    return mine;
  }

  // A few of the rows of a group at a time, pieces of their keys side by side.
  void attend_few(int64_t heads) {
    const int64_t all = groups_ * queries_, slices = (all + kFewRows - 1) / kFewRows;
    const int64_t pieces = (keys_ + kPiece - 1) / kPiece;
    const auto start = [&](int64_t slice) {
      const int64_t rows = std::min(kFewRows, all - slice * kFewRows);
      return FewRows(rows, q_.size(3), v_.size(3), scale_);
    };
    const int64_t size = start(0).saved_size();
    float* saved = sums().get(heads * slices * pieces * size);
    for_each_index(heads * slices * pieces, [&](int64_t i) {
      const int64_t head = i / pieces / slices, slice = i / pieces % slices;
      const int64_t batch = head / kv_heads_, own = head % kv_heads_;
      FewRows rows = start(slice);
      const int64_t first = i % pieces * kPiece, count = std::min(kPiece, keys_ - first);
      int64_t visible[kFewRows];
      for (int64_t r = 0; r < rows.count(); ++r) {
        const int64_t at = slice * kFewRows + r;
        rows.set(r, rows_of<const T>(q_, batch, own * groups_ + at / queries_).row(at % queries_));
        visible[r] = shape_.ahead == 0 ? keys_ - queries_ + at % queries_ + 1 - first : count;
      }
      const auto keys = rows_of<const T>(k_, batch, own), values = rows_of<const T>(v_, batch, own);
      rows.add<T>(
          count, [&](int64_t j) { return keys.row(first + j); },
          [&](int64_t j) { return values.row(first + j); }, nullptr, visible);
      rows.save(saved + i * size);
      if (!rows.finite()) {
        finite_ = false;
      }
    });
    for (int64_t i = 0; i < heads * slices; ++i) {
      FewRows rows = start(i % slices);
      for (int64_t p = 0; p < pieces; ++p) {
        rows.add_saved(saved + (i * pieces + p) * size);
      }
      const int64_t batch = i / slices / kv_heads_, own = i / slices % kv_heads_;
      for (int64_t r = 0; r < rows.count(); ++r) {
        const int64_t at = i % slices * kFewRows + r, head = own * groups_ + at / queries_;
        rows.store(r, rows_of<T>(out_, batch, head).row(at % queries_),
                   lse_.data_ptr<float>() + batch * lse_.stride(0) + head * lse_.stride(1) +
                       at % queries_);
      }
    }
  }

  static Buffer<float>& sums() {
    static thread_local Buffer<float> mine;
    return mine;
  }

  void attend_head(int64_t head) {
    F* memory = buffer().get(size_);
    for (int64_t key = 0; key < keys_; key += kPanel) {
      pack(head, key, memory);
    }
    for (int64_t row = 0; row < queries_ && finite_; row += tall_) {
      for (int64_t g = 0; g < groups_; ++g) {
        attend(head, g, row, memory);
      }
    }
  }

  // First the panels of all, then the rows, the longest first.
  void attend_heads(int64_t first, int64_t count, F* memory) {
    const int64_t panels = (keys_ + kPanel - 1) / kPanel, to_pack = count * panels;
    const int64_t blocks = (queries_ + tall_ - 1) / tall_;
    std::atomic<int64_t> packed{0};
    for_each_index(to_pack + count * blocks * groups_, [&](int64_t i) {
      if (i < to_pack) {
        const Counted done(packed);
        pack(first + i / panels, i % panels * kPanel, memory + i / panels * size_);
        return;
      }
      // Every panel is in the hands of a thread by now.
      while (packed.load(std::memory_order_acquire) < to_pack) {
        std::this_thread::yield();
      }
      if (finite_) {
        i -= to_pack;
        const int64_t place = i / groups_ / blocks, block = blocks - 1 - i / groups_ % blocks;
        attend(first + place, i % groups_, block * tall_, memory + place * size_);
      }
    });
  }

  // Counts when it is left, by whatever way: others wait for it.
  struct Counted {
    explicit Counted(std::atomic<int64_t>& counter) : counter(counter) {}
    ~Counted() { counter.fetch_add(1, std::memory_order_release); }
    std::atomic<int64_t>& counter;
  };

  Tiles<T, F> tiles(int64_t head) const {
    return {q_, k_, v_, out_, lse_, head / kv_heads_, head % kv_heads_, shape_, scale_};
  }

  Packed<F> packed(F* memory) const {
    return {memory, memory + round_up(keys_, kWidths) * q_.size(3)};
  }

  void check(const at::Tensor& x, int64_t batch, int64_t head, int64_t first, int64_t count) {
    if (!rows_finite(rows_of<const T>(x, batch, head), first, count, x.size(3))) {
      finite_ = false;
    }
  }

  void pack(int64_t head, int64_t key, F* memory) {
    const int64_t count = std::min(kPanel, keys_ - key);
    check(k_, head / kv_heads_, head % kv_heads_, key, count);
    check(v_, head / kv_heads_, head % kv_heads_, key, count);
    tiles(head).pack(0, key, packed(memory));
  }

  void attend(int64_t head, int64_t g, int64_t row, F* memory) {
    const int64_t rows = std::min(tall_, queries_ - row);
    check(q_, head / kv_heads_, head % kv_heads_ * groups_ + g, row, rows);
    tiles(head).attend(packed(memory), g, 0, row, rows);
  }

  const at::Tensor &q_, &k_, &v_, &out_, &lse_;
  const float scale_;
  const int64_t queries_, keys_, kv_heads_, groups_, size_, tall_;
  const Rectangle shape_;
  std::atomic<bool> finite_{true};
};

// Whether the layout contract holds, and the kernels take these inputs.
bool takes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
           bool causal) {
  for (const at::Tensor* x : {&q, &k, &v}) {
    const auto type = x->scalar_type();
    const bool narrow = type == at::kBFloat16 || type == at::kHalf;
    if (x->dim() != 4 || x->numel() == 0 || type != q.scalar_type()) {
      return false;
    }
    // Rows of 16-bit numbers move in pairs.
    if (narrow ? x->stride(2) % 2 != 0 : type != at::kFloat) {
      return false;
    }
    if (x->stride(3) != 1 || x->size(3) % 16 != 0) {
      return false;
    }
  }
  const bool fit = k.size(0) == q.size(0) && k.size(3) == q.size(3) && v.size(0) == k.size(0) &&
      v.size(1) == k.size(1) && v.size(2) == k.size(2) && q.size(1) % k.size(1) == 0;
  const bool by_unit =
      q.scalar_type() == at::kBFloat16 && takes_tiles<at::BFloat16>(q.size(3), v.size(3));
  const bool faster = by_unit || __builtin_cpu_is("amd");
  const int64_t scores = q.size(0) * q.size(1) * q.size(2) * k.size(2);
  if (!fit || !(scale > 0.0) || (causal && q.size(2) > k.size(2))) {
    return false;
  }
  return ((are_few(q, k) || faster) && scores <= kScores) || k.size(2) <= kMost;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, int64_t> attend_whole(const at::Tensor& q, const at::Tensor& k,
                                                         const at::Tensor& v,
                                                         std::optional<double> given, bool causal) {
  if (!takes(q, k, v, given.value_or(1.0), causal)) {
    return {at::Tensor(), at::Tensor(), -1};
  }
  const double scale = given.value_or(std::pow(static_cast<double>(q.size(3)), -0.5));
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), width = v.size(3);
  // Not by way of the dispatcher, which takes a twentieth of a short call.
  at::Tensor out = at::detail::empty_strided_cpu(
      {batch, heads, rows, width}, {rows * heads * width, width, heads * width, 1},
      q.scalar_type());
  at::Tensor lse = at::detail::empty_cpu({batch, heads, rows}, at::kFloat);
  bool finite = true;
  by_own_types(q.scalar_type(), [&](auto in, auto factor) {
    using Own = Whole<decltype(in), decltype(factor)>;
    finite = Own(q, k, v, out, lse, static_cast<float>(scale), causal).run();
  });
  return {out, lse, finite};
}

}  // namespace longswift
