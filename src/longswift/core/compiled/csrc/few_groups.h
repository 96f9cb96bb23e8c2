// Key tokens by the few groups of rows that a block has at great depth: those of several blocks
// share what is read of the keys and tiles of products, and only the ranks of the best are kept.
#pragma once

#include <algorithm>
#include <vector>

#include "centroids.h"
#include "chooser.h"
#include "running_best.h"

namespace longswift {

template <typename T, typename F, typename K = T>
class FewGroups : protected Chooser<T, F, K> {
  using Base = Chooser<T, F, K>;

 protected:
  using Maxima = typename Base::Maxima;
  // Of many candidates every 8th tile of 64 keys, the first of them the fifth, stands for all in
  // sums that only weigh groups of rows against each other, and the best of every 16 keys in it.
  static constexpr int64_t kMany = 4096, kEvery = 8, kFirst = 4, kSome = 16;

  struct Space {
    Buffer<F> means, panels, tile;
    Buffer<float> centres, sums, units;
    Buffer<typename Maxima::Sum> starts;
    Centroids centroids;
    Columns columns;
    Buffer<float> scales, sample, best, limits;
    Buffer<int32_t> places;
    std::vector<RunningBest> found;
    Best order;
  };

  FewGroups(const at::Tensor& q, const at::Tensor& k, const at::Tensor& band_lse,
            const at::Tensor& edges, at::Tensor& tokens, int64_t batch, int64_t head,
            const Choice& choice, float key_unit)
      : Base(q, k, band_lse, edges, tokens, batch, head, choice, key_unit),
        own_(of_thread<Space>()) {}

  // Writes the means of the n-th of some blocks, `groups` of at most `most` rows each, as factors;
  // those of the first are found. Returns what their products with keys are to be multiplied by.
  float write_means(int64_t n, int64_t row, int64_t rows, int64_t most, int64_t groups, F* means) {
    if (n > 0) {
      own_.centroids.find(q_, row + n * rows, rows, q_dim_, most);
    }
    float* centres = own_.centres.get(groups * q_dim_);
    for (int64_t g = 0; g < groups; ++g) {
      own_.centroids.mean(g, centres + g * q_dim_);
    }
    return factors_of_rows(centres, groups, means);
  }

  bool has_many(int64_t block) const { return candidates(block) >= kMany; }

  // Whether blocks of so many groups are worth to be taken together. All keys before each are then
  // its candidates.
  bool are_few(int64_t block, int64_t groups) const {
    return choice_.causal && groups < Maxima::kRows && has_many(block);
  }

  // Blocks that are taken together.
  static int64_t blocks_of(int64_t groups) { return kColumns / groups; }

  // Blocks [first, first + count), `groups` means of at most `most` rows each; those of the first
  // are found.
  void propose_by_few(int64_t first, int64_t count, int64_t row, int64_t rows, int64_t most,
                      int64_t groups) {
    const int64_t all = round_up(count * groups, kPair);
    pack_means(first, count, row, rows, most, groups, all);
    const int64_t last = before(first + count - 1);
    {
      const Maxima maxima(dim_);
      add_up(maxima, first, count, groups, all, last);
      auto& found = own_.found;
      found.resize(std::max<size_t>(found.size(), count));
      guess(maxima, first, count, groups, all);
      rank(maxima, first, count, groups, all, last);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = first + n;
      int32_t* blocks = mine_.blocks.get(choice_.sink_blocks + choice_.proposed);
      std::iota(blocks, blocks + choice_.sink_blocks, 0);
      const int64_t proposed =
          choice_.sink_blocks + own_.found[n].finish(blocks + choice_.sink_blocks);
      choose(proposed, row + n * rows, rows, tokens_ + block * choice_.budget);
    }
  }

  using Base::before;
  using Base::candidates;
  using Base::choice_;
  using Base::choose;
  using Base::dim_;
  using Base::factors_of_rows;
  using Base::k_;
  using Base::k_len_;
  using Base::kCoarse;
  using Base::kKeys;
  using Base::mine_;
  using Base::pack;
  using Base::q_;
  using Base::q_dim_;
  using Base::tile_of;
  using Base::tokens_;

  Space& own_;

 private:
  // Columns of two tiles, and those that share what is read of the keys.
  static constexpr int64_t kPair = 32, kColumns = 128;
  // Tiles of 16 keys that tell what the best ones exceed.
  static constexpr int64_t kSample = 1024;

  void pack_means(int64_t first, int64_t count, int64_t row, int64_t rows, int64_t most,
                  int64_t groups, int64_t all) {
    F* means = own_.means.get(count * groups * dim_);
    F* panels = own_.panels.get(round_up(all, Maxima::kPanel) * dim_);
    float *units = own_.units.get(count), *scales = own_.scales.get(all);
    std::fill(scales, scales + all, 1.0f);
    for (int64_t n = 0; n < count; ++n) {
      units[n] = write_means(n, row, rows, most, groups, means + n * groups * dim_);
      std::fill(scales + n * groups, scales + (n + 1) * groups, units[n]);
    }
    pack(means, count * groups, panels, 0, all);
  }

  // Sums of every mean over the best of every 16 of a sample of its candidates.
  void add_up(const Maxima& maxima, int64_t first, int64_t count, int64_t groups, int64_t all,
              int64_t last) {
    F* tile = own_.tile.get(kKeys * dim_);
    float *best = own_.best.get(kKeys * all), *scores = own_.sums.get(kSome * all);
    const F* panels = own_.panels.get(0);
    const float* scales = own_.scales.get(0);
    auto& columns = own_.columns;
    columns.begin(all, all);
    constexpr int64_t every = kEvery * kKeys;
    for (int64_t t = kFirst * kKeys; t < last; t += every) {
      fetch(k_, t + every, std::min(kKeys, last - t - every), dim_);
      int64_t step, padded;
      const F* keys = tile_of(t, std::min(kKeys, k_len_ - t), tile, &step, &padded);
      const bool whole = t + kKeys <= before(first);
      if (whole) {
        maxima.of_rows(keys, step, kKeys, panels, 0, all, best, all, [] {});
      }
      for (int64_t s = 0; s < padded; s += kSome) {
        float* of_some = best + s / kSome * all;
        if (!whole) {
          maxima.all(keys + s * step, step, kSome, panels, 0, all, scores, all);
          best_of_candidates(first, count, groups, t + s, scores, all, of_some);
        }
        // One by one, so that sums do not depend on which blocks are taken together.
        columns.template add<kCoarse>(of_some, all, 1, scales, 0, all);
      }
    }
    columns.finish();
    columns.drop(count * groups, all);
    auto* starts = own_.starts.get(all);
    for (int64_t n = 0; n < count; ++n) {
      columns.starts(own_.units.get(0)[n], n * groups, groups, starts);
    }
    columns.starts(1.0f, count * groups, all - count * groups, starts);
  }

  // The largest of 16 keys' scores, those of a block's own candidates.
  void best_of_candidates(int64_t first, int64_t count, int64_t groups, int64_t key,
                          const float* scores, int64_t all, float* best) const {
    std::fill(best, best + all, kHidden);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t keys = std::clamp<int64_t>(before(first + n) - key, 0, kSome);
      for (int64_t i = 0; i < keys; ++i) {
        for (int64_t c = n * groups; c < (n + 1) * groups; ++c) {
          best[c] = std::max(best[c], scores[i * all + c]);
        }
      }
    }
  }

  // Begins every block's search with what the best of its candidates exceed, judged by a sample.
  void guess(const Maxima& maxima, int64_t first, int64_t count, int64_t groups, int64_t all) {
    const int64_t tiles = before(first) / kSome;
    const int64_t sampled = std::clamp<int64_t>(tiles / 16, 1, kSample), numbers = sampled * kSome;
    float *sample = own_.sample.get(count * numbers), *limits = own_.limits.get(all);
    std::fill(sample, sample + count * numbers, kHidden);
    // Of what stands where no block does nothing is above it.
    std::fill(limits + count * groups, limits + all, -kHidden);
    std::fill(limits, limits + count * groups, kHidden);
    for (int64_t i = 0; i < sampled; ++i) {
      for_ranks(maxima, i * tiles / sampled * kSome, kSome, groups, all, [] {},
                [&](int64_t key, int64_t n, const float* ranks) {
                  float* to = sample + n * numbers + i * kSome;
                  std::copy(ranks, ranks + kSome, to);
                  const int64_t sinks = std::clamp<int64_t>(choice_.sink_blocks - key, 0, kSome);
                  std::fill(to, to + sinks, kHidden);
                });
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t end = before(first + n);
      // Neighbours are alike: the sample says less than as many keys from anywhere.
      const float expected = static_cast<float>(choice_.proposed) * numbers / end;
      const auto place = static_cast<int64_t>(expected + 4.0f * std::sqrt(expected) + 8.0f);
      float limit = kHidden;
      if (place < numbers) {
        const float* of_block = sample + n * numbers;
        int32_t* places = own_.places.get(place);
        const int64_t some = own_.order.find(of_block, numbers, place, places);
        limit = some == place ? -kHidden : kHidden;
        for (int64_t i = 0; i < some; ++i) {
          limit = std::min(limit, of_block[places[i]]);
        }
      }
      own_.found[n].begin(choice_.proposed, choice_.sink_blocks, end, limit);
    }
  }

  // Finds the candidates of highest rank: how little a key's product with one of a block's means is
  // below the mean's sum.
  void rank(const Maxima& maxima, int64_t first, int64_t count, int64_t groups, int64_t all,
            int64_t last) {
    auto& found = own_.found;
    float* limits = own_.limits.get(0);
    // As many for every 16 keys and pair of tiles that the next keys are there in time.
    const int64_t few = std::max<int64_t>(1, Maxima::kRows * kPair / all);
    for (bool again = true; again;) {
      for (int64_t n = 0; n < count; ++n) {
        std::fill(limits + n * groups, limits + (n + 1) * groups, found[n].limit());
      }
      int64_t fetched = kKeys;
      for (int64_t t = 0; t < last; t += kKeys) {
        const int64_t limit = std::min(last, t + 3 * kKeys);
        // The keys to come are fetched a few at a time: all at once they would wait for each other.
        const auto fetch_few = [&]() __attribute__((always_inline)) {
          for (int64_t i = 0; i < few && fetched < limit; ++i) {
            fetch(k_, fetched++, 1, dim_);
          }
        };
        for_ranks(maxima, t, kKeys, groups, all, fetch_few,
                  [&](int64_t key, int64_t n, const float* ranks) __attribute__((always_inline)) {
                    const float limit_before = found[n].limit();
                    found[n].add(key, ranks);
                    if (found[n].limit() != limit_before) {
                      std::fill(limits + n * groups, limits + (n + 1) * groups, found[n].limit());
                    }
                  });
      }
      again = false;
      for (int64_t n = 0; n < count; ++n) {
        if (found[n].complete()) {
          found[n].stop();
        } else {
          again = true;
          found[n].begin(choice_.proposed, choice_.sink_blocks, before(first + n), kHidden);
        }
      }
    }
  }

  // Calls `use` with the first of 16 of the keys, a block and their ranks, where one exceeds the
  // block's limit.
  template <typename Meanwhile, typename Use>
  void for_ranks(const Maxima& maxima, int64_t key, int64_t some, int64_t groups, int64_t all,
                 Meanwhile&& meanwhile, Use&& use) const {
    int64_t step, padded;
    const F* keys = tile_of(key, std::min(some, k_len_ - key), own_.tile.get(kKeys * dim_), &step,
                            &padded);
    maxima.of_groups(keys, step, padded, own_.panels.get(0), all, groups, own_.starts.get(0),
                     own_.limits.get(0), meanwhile,
                     [&](int64_t i, int64_t n, const float* ranks) __attribute__((always_inline)) {
                       use(key + i, n, ranks);
                     });
  }
};

}  // namespace longswift
