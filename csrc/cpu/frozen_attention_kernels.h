// frozen_attention on the CPU: attention with given logsumexps over any number of value streams. A tile of scores
// becomes weights and is multiplied with every stream's values while it lies in the L1 cache; no pattern is stored. A
// destination's result does not depend on threads or on how the work is cut.
//
// A task has some panels of destinations of one head and goes through their sources a chunk at a time: scores by
// multiply(), weights exp(score - logsumexp) in place, then each group of columns of the values of all streams is
// packed and multiplied with the weights while both lie in the caches.
#pragma once

#include "dispatch.h"
#include "interrupts.h"

namespace fc::cpu {

// Destinations take from sources: queries from keys or, in the transposed form, keys from queries. There time runs
// backwards, by negative strides, so that in both forms a destination sees the sources up to its own position.
struct AttentionArguments {
  Strided<4> to, from;           // [B,Ht,T,r] and [B,Hf,T,r] of one type
  Strided<5> values, out;        // [S,B,Hf,T,s] of that type, and [S,B,Ht,T,s]
  double* lse;                   // of the queries, [B,H,T]
  const double *before, *after;  // [B,T] or null: factors of a source's values and of a destination's result
  const uint8_t* mask;           // [B,T] or null: keys that are there
  int64_t batches, heads_to, heads_from, positions, rank, streams, width;
  int64_t window;         // a source so far away, or farther, is hidden
  double scale, softcap;  // softcap 0: none
  bool find_lse, transposed;
};

struct AttentionTask {
  int64_t batch, head, first, end;  // destinations first..end of a head; first is a multiple of a panel
};

struct AttentionKernels {
  int64_t panel;                                                        // destinations that share a tile
  int64_t (*packed_bytes)(const AttentionArguments&);                   // of one head of sources
  void (*pack)(const AttentionArguments&, void* packed, int64_t head);  // head of B * Hf
  int64_t (*scratch_bytes)(const AttentionArguments&, int64_t panels);  // of a task
  void (*attend)(const AttentionArguments&, const void* packed, const AttentionTask&, void* scratch);
};

constexpr int64_t kMostPanels = 16;  // of a task

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cmath>
#include <limits>

#include "exp.h"

namespace fc::cpu::FC_TIER {

// Sources whose weights wait for the values of all streams; a logsumexp is summed over as many at a time. Their weights
// for one panel of destinations stay in the L1 cache.
inline constexpr int64_t kChunk = 96;
static_assert(kChunk % kRows == 0 && kChunk * kVectors * kVectorBytes <= kSmallestL1 * 2 / 3);

template <class Scheme, class Source>
struct Attention {
  using T = typename Scheme::Accumulator;
  using Left = typename Scheme::Left;
  using Right = typename Scheme::Right;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;
  static constexpr int64_t kSteps = kChunk / Scheme::kDepth;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  const AttentionArguments& a;
  const void* packed;
  const AttentionTask& task;
  uintptr_t next;  // of the scratch: an address
  const int64_t panels = panels_of<Scheme>(task.end - task.first);
  const int64_t depth = steps<Scheme>(a.rank);
  const int64_t columns = a.streams * a.width, groups = blocks_of(columns);  // of values; of kRows columns
  Right* const queries = take<Right>(panels * kW * depth);
  T* const high = take<T>(panels * kW);  // the destinations' logsumexp is high + low
  T* const low = take<T>(panels * kW);
  T* const weights = take<T>(panels * kChunk * kW);
  Right* const rounded = take<Right>(Scheme::kDepth > 1 ? panels * kSteps * kW : 0);
  Left* const values = take<Left>(kSteps * kRows);           // of one group
  T* const results = take<T>(panels * groups * kRows * kW);  // [group][panel][kRows][kW]

  template <class U>
  U* take(int64_t count) {
    U* out = reinterpret_cast<U*>(next);
    next += (static_cast<uintptr_t>(count) * sizeof(U) + 63) / 64 * 64;
    return out;
  }

  // The bytes that a task of `panels` takes: where a scratch at 0 would end.
  static int64_t scratch_bytes(const AttentionArguments& a, int64_t panels) {
    return static_cast<int64_t>(Attention{a, nullptr, {.batch = 0, .head = 0, .first = 0, .end = panels * kW}, 0}.next);
  }

  struct Sources {  // of a chunk
    T factor[kChunk], high[kChunk], low[kChunk];
    bool hidden[kChunk];
  };
  Sources sources{};

  int64_t place(int64_t t) const { return a.transposed ? a.positions - 1 - t : t; }
  static void split(double x, T& high, T& low) {
    high = static_cast<T>(x);
    low = std::isfinite(x) ? static_cast<T>(x - static_cast<double>(high)) : T(0);
  }

  static int64_t packed_size(const AttentionArguments& a) {
    return blocks_of(a.positions) * kRows * steps<Scheme>(a.rank);
  }
  static int64_t packed_bytes(const AttentionArguments& a) {
    return packed_size(a) * static_cast<int64_t>(sizeof(Left));
  }

  static void pack(const AttentionArguments& a, void* packed, int64_t head) {
    const auto* from = static_cast<const Source*>(a.from.data) + head / a.heads_from * a.from.stride[0] +
                       head % a.heads_from * a.from.stride[1];
    pack_rows<Scheme>(static_cast<Left*>(packed) + head * packed_size(a), from, a.positions, a.rank, a.from.stride[2],
                      a.from.stride[3]);
  }

  // Reads a chunk's sources: which are hidden, and their factors. Those past the last source are hidden.
  void read_sources(int64_t chunk, int64_t head) {
    const double* lse = a.lse + (task.batch * a.heads_from + head) * a.positions;
    for (int64_t j = 0; j < kChunk; ++j) {
      const bool here = chunk + j < a.positions;
      const int64_t t = here ? place(chunk + j) : 0, row = task.batch * a.positions + t;
      sources.hidden[j] = !here || (a.transposed ? lse[t] == -std::numeric_limits<double>::infinity()
                                                 : a.mask != nullptr && !a.mask[row]);
      sources.factor[j] = a.before == nullptr ? T(1) : sources.hidden[j] ? T(0) : static_cast<T>(a.before[row]);
      if (a.transposed) split(here ? lse[t] : 0.0, sources.high[j], sources.low[j]);
    }
  }

  // Column c of the values of all streams, at a source.
  const Source* value(int64_t c, int64_t source, int64_t head) const {
    const int64_t* stride = a.values.stride;
    return static_cast<const Source*>(a.values.data) + c / a.width * stride[0] + task.batch * stride[1] +
           head * stride[2] + source * stride[3] + c % a.width * stride[4];
  }

  // Packs a group of columns of a chunk's values, [step][kRows]; zeros for hidden sources, whatever stands there. Also
  // prefetches the next group: its rows lie too far apart for the hardware to follow.
  void pack_values(int64_t group, int64_t chunk, int64_t head) {
    static constexpr Source kNone[kRows] = {};
    const int64_t stride = a.values.stride[3];
    const Source* from[kRows];
    for (int64_t i = 0; i < kRows; ++i) from[i] = value(smaller(group * kRows + i, columns - 1), chunk, head);
    const Source* next = value(smaller((group + 1) * kRows, columns - 1), chunk, head);
    bool adjacent = true;
    for (int i = 1; i < kRows; ++i) adjacent &= from[i] == from[0] + i;
    Left* out = values;
    for (int64_t j = 0; j < kChunk; out += kRows) {
      T scaled[Scheme::kDepth][kRows];
      for (int64_t d = 0; d < Scheme::kDepth; ++d, ++j) {
        const int64_t offset = j * stride;
        if (adjacent || sources.hidden[j]) {
          const Source* row = sources.hidden[j] ? kNone : from[0] + offset;
          for (int i = 0; i < kRows; ++i) scaled[d][i] = widen(row[i]) * sources.factor[j];
        } else {
          for (int i = 0; i < kRows; ++i) scaled[d][i] = widen(from[i][offset]) * sources.factor[j];
        }
        if (!sources.hidden[j]) __builtin_prefetch(next + offset, 0, 2);
      }
      for (int i = 0; i < kRows; ++i) out[i] = Scheme::left(scaled[0] + i, kRows, Scheme::kDepth);
    }
  }

  // Sources of a chunk, in whole blocks, that some destination of the panel sees.
  struct Range {
    int64_t first, end;
  };
  Range seen(int64_t panel, int64_t chunk) const {
    const int64_t first = task.first + panel * kW, last = smaller(first + kW, task.end) - 1;
    const int64_t from = larger(chunk, first - a.window + 1), to = smaller(chunk + kChunk, last + 1);
    return {from / kRows * kRows, from < to ? blocks_of(to) * kRows : from / kRows * kRows};
  }

  // Makes products into scores, in place: scale, then soft cap. Not inlined, so that the compiler cannot fuse the scale
  // with a subtraction: weights must be made of the very scores whose logsumexp was taken.
  [[gnu::noinline]] void finish_scores(T* tile) const {
    const auto scale = static_cast<T>(a.scale), cap = static_cast<T>(a.softcap);
    for (int64_t n = 0; n < kRows * kW; n += kL) {
      const Vec<T> x = load(tile + n) * scale;
      store(tile + n, cap == 0 ? x : hyperbolic_tangent<T>(x / cap) * cap);
    }
  }

  // Replaces, in a tile of scores or weights, what a panel's destinations do not see of a block of sources.
  void hide(T* tile, int64_t panel, int64_t source, int64_t chunk, T by) const {
    const int64_t first = task.first + panel * kW;
    for (int64_t j = source; j < source + kRows; ++j, tile += kW) {
      const bool hidden = sources.hidden[j - chunk];
      if (!hidden && j <= first && first + kW - j <= a.window) continue;
      const int64_t from = hidden ? kW : j - first, to = larger(from, smaller(kW, j - first + a.window));
      for (int64_t i = 0; i < smaller(from, kW); ++i) tile[i] = by;
      for (int64_t i = larger(to, 0); i < kW; ++i) tile[i] = by;
    }
  }

  // The tile of scores of a block of sources and a panel of destinations. Not inlined: the accumulators need every
  // register.
  [[gnu::noinline]] T* score(const Left* keys, int64_t panel, int64_t source, int64_t chunk) {
    T* tile = weights + (panel * kChunk + source - chunk) * kW;
    multiply<Scheme>(tile, keys + source * depth, queries + panel * kW * depth, depth);
    finish_scores(tile);
    return tile;
  }

  // Makes scores into weights, exp(score - logsumexp).
  void weigh(T* tile, int64_t panel, int64_t j) const {
    for (int i = 0; i < kRows; ++i, ++j)
      for (int v = 0; v < kVectors; ++v, tile += kL) {
        const int64_t at = panel * kW + v * kL;
        const Vec<T> above = a.transposed ? broadcast(sources.high[j]) : load(high + at);
        const Vec<T> rest = a.transposed ? broadcast(sources.low[j]) : load(low + at);
        store(tile, exponential<T>(load(tile) - above - rest));
      }
  }

  // The running maximum and sum of exponentials of each of a panel's destinations.
  struct Totals {
    T highest[kW];
    double total[kW];
  };

  void add_chunk(Totals& totals, const T* scores, int64_t count) const {
    for (int v = 0; v < kVectors; ++v, scores += kL) {
      Vec<T> highest = load(totals.highest + v * kL), nan{}, sums{};
      for (int64_t j = 0; j < count; ++j) {
        const Vec<T> x = load(scores + j * kW);
        highest = at_least(highest, x);
        nan += x == x ? Vec<T>{} : broadcast<T>(1);
      }
      for (int64_t j = 0; j < count; j += kRows) {  // a block at a time: fewer addends for each rounding
        Vec<T> block{};
        for (int i = 0; i < kRows; ++i) block += exponential<T>(load(scores + (j + i) * kW) - highest);
        sums += block;
      }
      for (int i = 0; i < kL; ++i) {
        T& before = totals.highest[v * kL + i];
        double& total = totals.total[v * kL + i];
        if (highest[i] != before) total *= std::exp(static_cast<double>(before) - static_cast<double>(highest[i]));
        total += static_cast<double>(sums[i]);
        before = nan[i] != 0 ? std::numeric_limits<T>::quiet_NaN() : highest[i];
      }
    }
  }

  void find_lse(const Left* keys, int64_t head) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      Totals totals;
      for (int64_t i = 0; i < kW; ++i) totals.highest[i] = std::numeric_limits<T>::lowest(), totals.total[i] = 0;
      for (int64_t chunk = first_chunk(); chunk < task.end; chunk += kChunk) {
        const Range range = seen(panel, chunk);
        if (range.first >= range.end) continue;
        look_for_interrupt();
        read_sources(chunk, head);
        for (int64_t source = range.first; source < range.end; source += kRows) {
          T* tile = score(keys, panel, source, chunk);
          hide(tile, panel, source, chunk, -kInfinity);
        }
        add_chunk(totals, weights + (panel * kChunk + range.first - chunk) * kW, range.end - range.first);
      }
      double* lse = a.lse + (task.batch * a.heads_to + task.head) * a.positions + task.first + panel * kW;
      for (int64_t i = 0; i < smaller(kW, task.end - task.first - panel * kW); ++i) {
        const auto highest = static_cast<double>(totals.highest[i]);
        lse[i] = highest + std::log(totals.total[i]);
        if (totals.total[i] < 0.5) lse[i] = -std::numeric_limits<double>::infinity();  // the maximum alone counts 1
        if (!std::isfinite(highest)) lse[i] = highest;                                 // NaN or +inf
      }
    }
  }

  // The weights of a panel, as a right factor.
  const Right* factor_of(int64_t panel, const Range& range, int64_t chunk) {
    const T* exact = weights + (panel * kChunk + range.first - chunk) * kW;
    if constexpr (Scheme::kDepth == 1) {
      return exact;
    } else {
      Right* out = rounded + panel * kSteps * kW;
      pack_right<Scheme>(out, exact, range.end - range.first, kW, kW, 1);
      return out;
    }
  }

  // Not inlined: the accumulators need every register.
  [[gnu::noinline]] void accumulate(T* sums, const Left* left, const Right* right, int64_t count) const {
    multiply<Scheme>(sums, left, right, count, [&](int row) { return sums + row * kW; });
  }

  // Adds what a head's sources give. Of each chunk, the weights of all panels are made first; then each group of
  // columns of its values, once packed, serves all panels from the L1 cache.
  [[gnu::always_inline]] void add_values(const Left* keys, int64_t head) {
    struct {
      Range range;
      const Right* weights;
    } seen_by[kMostPanels];
    for (int64_t chunk = first_chunk(); chunk < task.end; chunk += kChunk) {
      look_for_interrupt();
      read_sources(chunk, head);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Range range = seen(panel, chunk);
        for (int64_t source = range.first; source < range.end; source += kRows) {
          T* tile = score(keys, panel, source, chunk);
          weigh(tile, panel, source - chunk);
          hide(tile, panel, source, chunk, T(0));
        }
        seen_by[panel] = {range, factor_of(panel, range, chunk)};
      }
      for (int64_t group = 0; group < groups; ++group) {
        pack_values(group, chunk, head);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const auto& [range, seen_weights] = seen_by[panel];
          if (range.first < range.end)
            accumulate(results + (group * panels + panel) * kRows * kW,
                       values + (range.first - chunk) / Scheme::kDepth * kRows, seen_weights,
                       (range.end - range.first) / Scheme::kDepth);
        }
      }
    }
  }

  // Writes the results of destination t: zeros for a query that sees no key and for a key that is masked, NaN for a
  // query whose logsumexp is not finite.
  void write(int64_t t) {
    const int64_t row = task.batch * a.positions + place(t), panel = (t - task.first) / kW,
                  lane = (t - task.first) % kW;
    const double lse = a.transposed ? 0 : a.lse[(task.batch * a.heads_to + task.head) * a.positions + t];
    const bool empty =
        a.transposed ? a.mask != nullptr && !a.mask[row] : lse == -std::numeric_limits<double>::infinity();
    const T factor = a.after == nullptr ? T(1) : static_cast<T>(a.after[row]);
    const int64_t* stride = a.out.stride;
    T* start = static_cast<T*>(a.out.data) + task.batch * stride[1] + task.head * stride[2] + t * stride[3];
    for (int64_t c = 0; c < columns;) {
      T* out = start + c / a.width * stride[0];
      for (int64_t e = 0; e < a.width; ++e, ++c)
        out[e] = results[((c / kRows * panels + panel) * kRows + c % kRows) * kW + lane] * factor;
      if (empty || !std::isfinite(lse))
        for (int64_t c = 0; c < a.width; ++c) out[c] = empty ? T(0) : std::numeric_limits<T>::quiet_NaN();
    }
  }

  int64_t first_chunk() const { return larger(0, task.first - a.window + 1) / kChunk * kChunk; }

  void run() {
    const int64_t* stride = a.to.stride;
    const auto* to = static_cast<const Source*>(a.to.data) + task.batch * stride[0] + task.head * stride[1];
    pack_right<Scheme>(queries, to + task.first * stride[2], a.rank, task.end - task.first, stride[3], stride[2]);
    const int64_t first = task.head * a.heads_from / a.heads_to, count = larger(1, a.heads_from / a.heads_to);
    const auto keys = [&](int64_t head) {
      return static_cast<const Left*>(packed) + (task.batch * a.heads_from + head) * packed_size(a);
    };
    if (a.find_lse) find_lse(keys(first), first);
    if (columns == 0) return;
    const double* lse = a.lse + (task.batch * a.heads_to + task.head) * a.positions;
    for (int64_t i = 0; i < panels * kW; ++i) {
      const bool here = !a.transposed && task.first + i < task.end;
      split(here ? lse[task.first + i] : 0.0, high[i], low[i]);
    }
    std::memset(results, 0, static_cast<size_t>(panels * groups * kRows * kW) * sizeof(T));
    for (int64_t head = first; head < first + count; ++head) add_values(keys(head), head);
    for (int64_t t = task.first; t < task.end; ++t) write(t);
  }

  static const AttentionKernels* kernels() {
    static constexpr AttentionKernels table{
        kW, packed_bytes, pack, scratch_bytes,
        [](const AttentionArguments& a, const void* packed, const AttentionTask& task, void* scratch) {
          Attention{a, packed, task, reinterpret_cast<uintptr_t>(scratch)}.run();
        }};
    return &table;
  }
};

const AttentionKernels* attention_kernels(Arithmetic arithmetic) { return select<Attention>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#endif
