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
// Query rows for which it is worth while to pack more keys than `kAlone`; products of 16 bits are
// cheap, even if most of their rows are nobody's.
constexpr int64_t kFewest = 32;
constexpr int64_t kFewestNarrow = 4;
// Keys that a single row meets in one piece.
constexpr int64_t kPiece = 1024;
// Farther than any key.
constexpr int64_t kFar = int64_t{1} << 40;

// Whether every head of a group has one row, and they are few together.
bool is_row(const at::Tensor& q, const at::Tensor& k) {
  return q.size(2) == 1 && q.size(1) / k.size(1) <= kFewRows;
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
    if (is_row(q_, k_)) {
      attend_row(heads);
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

  // Every head's single row, pieces of its keys side by side.
  void attend_row(int64_t heads) {
    const int64_t pieces = (keys_ + kPiece - 1) / kPiece;
    const auto start = [&] {
      return FewRows(groups_, q_.size(3), v_.size(3), scale_);
    };
    const int64_t size = start().saved_size();
    float* saved = sums().get(heads * pieces * size);
    for_each_index(heads * pieces, [&](int64_t i) {
      const int64_t batch = i / pieces / kv_heads_, head = i / pieces % kv_heads_;
      FewRows rows = start();
      for (int64_t g = 0; g < groups_; ++g) {
        rows.set(g, rows_of<const T>(q_, batch, head * groups_ + g).row(0));
      }
      const auto keys = rows_of<const T>(k_, batch, head), values = rows_of<const T>(v_, batch, head);
      const int64_t first = i % pieces * kPiece;
      rows.add<T>(
          std::min(kPiece, keys_ - first), [&](int64_t j) { return keys.row(first + j); },
          [&](int64_t j) { return values.row(first + j); });
      rows.save(saved + i * size);
      if (!rows.finite()) {
        finite_ = false;
      }
    });
    for (int64_t i = 0; i < heads; ++i) {
      FewRows rows = start();
      for (int64_t p = 0; p < pieces; ++p) {
        rows.add_saved(saved + (i * pieces + p) * size);
      }
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t batch = i / kv_heads_, own = i % kv_heads_ * groups_ + g;
        rows.store(g, rows_of<T>(out_, batch, own).row(0),
                   lse_.data_ptr<float>() + batch * lse_.stride(0) + own * lse_.stride(1));
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
  const int64_t fewest = multiplies(q.scalar_type()) ? kFewestNarrow : kFewest;
  const bool by_unit =
      q.scalar_type() == at::kBFloat16 && takes_tiles<at::BFloat16>(q.size(3), v.size(3));
  const bool faster = by_unit || __builtin_cpu_is("amd");
  const int64_t scores = q.size(0) * q.size(1) * q.size(2) * k.size(2);
  if (!fit || !(scale > 0.0) || (causal && q.size(2) > k.size(2))) {
    return false;
  }
  return (is_row(q, k) && scores <= kScores) ||
      ((k.size(2) <= kMost || (faster && scores <= kScores)) &&
       (k.size(2) <= kAlone || q.size(2) >= fewest));
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
