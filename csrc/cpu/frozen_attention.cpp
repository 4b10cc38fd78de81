// frozen_attention on the CPU: a tile of scores becomes weights by the known logsumexp and is multiplied with every
// stream of values while it lies in the L1 cache; no pattern is stored. A destination's result does not depend on
// threads or on how the work is cut.
#include <cstdint>

#include "dispatch.h"

namespace fc::cpu {

// Destinations take from sources: queries from keys, or, transposed, keys from queries. Transposed, time runs backwards
// by negative strides, so that a destination sees the sources up to its own position either way.
struct AttentionArguments {
  const void *to, *from, *values;  // [B,Ht,T,r], [B,Hf,T,r], [S,B,Hf,T,s] of one type, any strides
  void* out;                       // [S,B,Ht,T,s]
  int64_t to_stride[4], from_stride[4], value_stride[5], out_stride[5];
  double* lse;                   // of the queries, [B,H,T]
  const double *before, *after;  // [B,T] or null: multiply a source's values, a destination's result
  const uint8_t* mask;           // [B,T] or null: keys that are there
  int64_t batches, heads_to, heads_from, positions, rank, streams, width;
  int64_t window;         // a source at this distance is hidden
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
#include "tile.h"

namespace fc::cpu::FC_TIER {
namespace {

// Sources whose weights wait for the values of all streams: 18 KiB of them for one panel, which fit the L1 cache.
constexpr int64_t kChunk = 96;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

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
  char* next;  // of the scratch
  const int64_t panels = (task.end - task.first + kW - 1) / kW;
  const int64_t depth = steps<Scheme>(a.rank);
  const int64_t columns = a.streams * a.width, groups = blocks_of(columns);  // of values; of kRows columns
  Right* const queries = take<Right>(panels * kW * depth);
  T *const high = take<T>(panels * kW), *const low =
                                            take<T>(panels * kW);  // logsumexp of the destinations, in two parts
  T* const weights = take<T>(panels * kChunk * kW);
  Right* const rounded = take<Right>(Scheme::kDepth > 1 ? panels * kSteps * kW : 0);
  Left* const values = take<Left>(kSteps * kRows);           // of one group
  T* const results = take<T>(panels * groups * kRows * kW);  // [group][panel][kRows][kW]

  template <class U>
  U* take(int64_t count) {
    U* out = reinterpret_cast<U*>(next);
    next += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return out;
  }

  // What a task of `panels` takes at most.
  static int64_t scratch_bytes(const AttentionArguments& a, int64_t panels) {
    const int64_t groups = blocks_of(a.streams * a.width);
    const auto size = [](int64_t count, size_t each) { return count * static_cast<int64_t>(each) + 64; };
    return size(panels * kW * steps<Scheme>(a.rank), sizeof(Right)) + 2 * size(panels * kW, sizeof(T)) +
           size(panels * kChunk * kW, sizeof(T)) + size(panels * kSteps * kW, sizeof(Right)) +
           size(kSteps * kRows, sizeof(Left)) + size(panels * groups * kRows * kW, sizeof(T));
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
    Left* out = static_cast<Left*>(packed) + head * packed_size(a);
    const int64_t depth = steps<Scheme>(a.rank);
    std::memset(static_cast<void*>(out), 0, static_cast<size_t>(packed_bytes(a)));
    const Source* from = static_cast<const Source*>(a.from) + head / a.heads_from * a.from_stride[0] +
                         head % a.heads_from * a.from_stride[1];
    for (int64_t t = 0; t < a.positions; ++t)
      pack_left<Scheme>(out + t / kRows * kRows * depth, static_cast<int>(t % kRows), from + t * a.from_stride[2],
                        a.rank, a.from_stride[3]);
  }

  // What is known of the sources of a chunk; those past the last are hidden.
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
    return static_cast<const Source*>(a.values) + c / a.width * a.value_stride[0] + task.batch * a.value_stride[1] +
           head * a.value_stride[2] + source * a.value_stride[3] + c % a.width * a.value_stride[4];
  }

  // A group of columns of a chunk's values, [step][kRows]; zeros for hidden sources, whatever stands there. Fetches the
  // next group, whose rows lie apart, which no hardware prefetcher follows.
  void pack_values(int64_t group, int64_t chunk, int64_t head) {
    static constexpr Source kNone[kRows] = {};
    const Source* from[kRows];
    for (int64_t i = 0; i < kRows; ++i) from[i] = value(smaller(group * kRows + i, columns - 1), chunk, head);
    const Source* next = value(smaller((group + 1) * kRows, columns - 1), chunk, head);
    bool adjacent = true;
    for (int i = 1; i < kRows; ++i) adjacent &= from[i] == from[0] + i;
    Left* out = values;
    for (int64_t j = 0; j < kChunk; out += kRows) {
      T scaled[Scheme::kDepth][kRows];
      for (int64_t d = 0; d < Scheme::kDepth; ++d, ++j) {
        const int64_t offset = j * a.value_stride[3];
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

  // The scores of a block of sources, in place. Apart from what uses them: a score that were fused into a subtraction
  // would not be the one whose logsumexp was taken.
  [[gnu::noinline]] void finish_scores(T* tile) const {
    const auto scale = static_cast<T>(a.scale), cap = static_cast<T>(a.softcap);
    for (int64_t n = 0; n < kRows * kW; n += kL) {
      const Vec<T> x = load(tile + n) * scale;
      store(tile + n, cap == 0 ? x : hyperbolic_tangent<T>(x / cap) * cap);
    }
  }

  // Replaces what a panel's destinations do not see of a block of sources.
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

  // Not inlined: the accumulators need every register.
  [[gnu::noinline]] T* score(const Left* keys, int64_t panel, int64_t source, int64_t chunk) {
    T* tile = weights + (panel * kChunk + source - chunk) * kW;
    multiply<Scheme>(tile, keys + source * depth, queries + panel * kW * depth, depth);
    finish_scores(tile);
    return tile;
  }

  // Scores become weights.
  void weigh(T* tile, int64_t panel, int64_t j) const {
    for (int i = 0; i < kRows; ++i, ++j)
      for (int v = 0; v < kVectors; ++v, tile += kL) {
        const int64_t at = panel * kW + v * kL;
        const Vec<T> above = a.transposed ? broadcast(sources.high[j]) : load(high + at);
        const Vec<T> rest = a.transposed ? broadcast(sources.low[j]) : load(low + at);
        store(tile, exponential<T>(load(tile) - above - rest));
      }
  }

  // Running maximum and sum of exponentials of one panel's destinations.
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

  // Weights of a chunk for all panels first; then each group of columns of its values serves all of them from the L1
  // cache.
  void add_values(const Left* keys, int64_t head) {
    struct {
      Range range;
      const Right* right;
    } seen_by[kMostPanels];
    for (int64_t chunk = first_chunk(); chunk < task.end; chunk += kChunk) {
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
          const auto& [range, right] = seen_by[panel];
          if (range.first < range.end)
            accumulate(results + (group * panels + panel) * kRows * kW,
                       values + (range.first - chunk) / Scheme::kDepth * kRows, right,
                       (range.end - range.first) / Scheme::kDepth);
        }
      }
    }
  }

  // Results of destination t, or what stands for them where there are none: a query without a key, a key that is not
  // there, a query whose scores are not finite.
  void write(int64_t t) {
    const int64_t row = task.batch * a.positions + place(t), panel = (t - task.first) / kW,
                  lane = (t - task.first) % kW;
    const double lse = a.transposed ? 0 : a.lse[(task.batch * a.heads_to + task.head) * a.positions + t];
    const bool empty =
        a.transposed ? a.mask != nullptr && !a.mask[row] : lse == -std::numeric_limits<double>::infinity();
    const T factor = a.after == nullptr ? T(1) : static_cast<T>(a.after[row]);
    T* start =
        static_cast<T*>(a.out) + task.batch * a.out_stride[1] + task.head * a.out_stride[2] + t * a.out_stride[3];
    for (int64_t c = 0; c < columns;) {
      T* out = start + c / a.width * a.out_stride[0];
      for (int64_t e = 0; e < a.width; ++e, ++c)
        out[e] = results[((c / kRows * panels + panel) * kRows + c % kRows) * kW + lane] * factor;
      if (empty || !std::isfinite(lse))
        for (int64_t c = 0; c < a.width; ++c) out[c] = empty ? T(0) : std::numeric_limits<T>::quiet_NaN();
    }
  }

  int64_t first_chunk() const { return larger(0, task.first - a.window + 1) / kChunk * kChunk; }

  void run() {
    const Source* to = static_cast<const Source*>(a.to) + task.batch * a.to_stride[0] + task.head * a.to_stride[1];
    pack_right<Scheme>(queries, to + task.first * a.to_stride[2], a.rank, task.end - task.first, a.to_stride[3],
                       a.to_stride[2]);
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
};

template <class Scheme, class Source>
const AttentionKernels* kernels() {
  using A = Attention<Scheme, Source>;
  static constexpr AttentionKernels table{A::kW, A::packed_bytes, A::pack, A::scratch_bytes,
                                          [](const AttentionArguments& a, const void* packed, const AttentionTask& task,
                                             void* scratch) { A{a, packed, task, static_cast<char*>(scratch)}.run(); }};
  return &table;
}

}  // namespace

// Null where this tier has no such instruction.
const AttentionKernels* attention_kernels(Kind kind) {
  switch (kind) {
    case Kind::fp32:
      return kernels<Ieee<float>, float>();
    case Kind::fp64:
      return kernels<Ieee<double>, double>();
    case Kind::bf16_inputs:
      return kernels<Ieee<float>, BFloat16>();
#if defined(__AVX512BF16__)
    case Kind::fp32_by_bf16:
      return kernels<Bf16Dot, float>();
    case Kind::bf16_by_bf16:
      return kernels<Bf16Dot, BFloat16>();
#endif
    default:
      return nullptr;
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../check.h"
#include "../plan.h"
#include "scratch.h"

namespace fc::cpu {

FC_TIERS(const AttentionKernels*, attention_kernels, Kind)

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kResultBytes = 320 << 10;  // of a task at most: they and a chunk's weights fit an L2 cache of 1 MiB

// The tensor's strides, and its first element; with time, the axis before the last, running backwards if asked to.
void* view(const Tensor& x, bool backwards, int64_t* stride) {
  for (int64_t i = 0; i < x.dim(); ++i) stride[i] = x.stride(i);
  auto* start = static_cast<char*>(x.data_ptr());
  if (!backwards || x.numel() == 0) return start;
  int64_t& time = stride[x.dim() - 2];
  start += (x.size(x.dim() - 2) - 1) * time * static_cast<int64_t>(x.element_size());
  time = -time;
  return start;
}

std::optional<Tensor> contiguous_as(const std::optional<Tensor>& x, ScalarType dtype) {
  if (!x.has_value()) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*x, dtype));
}

template <class T>
const T* data_of(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

void attend(const AttentionArguments& a, const AttentionKernels& kernels) {
  const Shared packed(a.batches * a.heads_from * kernels.packed_bytes(a));
  run_tasks(a.batches * a.heads_from, [&](int64_t head, int64_t) { kernels.pack(a, packed.data(), head); });
  const int64_t heads = a.batches * a.heads_to, all = ceil_div(a.positions, kernels.panel);
  // As many panels to a task as its results have room for, since each packs the values anew, but tasks enough to share.
  const int64_t fitting = kResultBytes / std::max<int64_t>(kernels.panel * a.streams * a.width * 4, 1);
  const int64_t panels = std::clamp<int64_t>(heads * all / (8 * torch::stable::get_num_threads()), 1,
                                             std::clamp<int64_t>(fitting, 1, kMostPanels));
  const int64_t blocks = ceil_div(all, panels), rows = panels * kernels.panel;
  const int64_t scratch = (kernels.scratch_bytes(a, panels) + 63) / 64 * 64;
  const Shared scratches(scratch * torch::stable::get_num_threads());
  run_tasks(heads * blocks, [&](int64_t i, int64_t slot) {  // the last destinations first: they see the most sources
    const int64_t head = i / blocks, first = (blocks - 1 - i % blocks) * rows;
    kernels.attend(a, packed.data(), {head / a.heads_to, head % a.heads_to, first, std::min(first + rows, a.positions)},
                   static_cast<char*>(scratches.data()) + slot * scratch);
  });
}

std::tuple<Tensor, Tensor> frozen_attention(const Tensor& q, const Tensor& k, const Tensor& values,
                                            const std::optional<Tensor>& lse, const std::optional<Tensor>& pre,
                                            const std::optional<Tensor>& post, const std::optional<Tensor>& mask,
                                            double scale, std::optional<int64_t> window, std::optional<double> softcap,
                                            bool transposed, const std::string& precision) {
  STD_TORCH_CHECK(q.dim() == 4, "q has shape ", shape_of(q), ", expected [B, H, T, r]");
  STD_TORCH_CHECK(k.dim() == 4, "k has shape ", shape_of(k), ", expected [B, Hkv, T, r]");
  STD_TORCH_CHECK(values.dim() == 5, "values has shape ", shape_of(values), ", expected [S, B, Hkv, T, s]");
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), r = q.size(3), Hkv = k.size(1);
  const int64_t S = values.size(0), s = values.size(4);
  STD_TORCH_CHECK(Hkv > 0 ? H % Hkv == 0 : H == 0, "q has ", H, " heads, no multiple of k's ", Hkv);
  FC_CHECK_SHAPE(k, (Shape{B, Hkv, T, r}));
  FC_CHECK_SHAPE(values, (Shape{S, B, transposed ? H : Hkv, T, s}));
  if (lse.has_value()) FC_CHECK_SHAPE(*lse, (Shape{B, H, T}));
  if (pre.has_value()) FC_CHECK_SHAPE(*pre, (Shape{B, T}));
  if (post.has_value()) FC_CHECK_SHAPE(*post, (Shape{B, T}));
  if (mask.has_value()) {
    FC_CHECK_SHAPE(*mask, (Shape{B, T}));
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  }
  STD_TORCH_CHECK(lse.has_value() || !transposed, "lse is None, but the transposed form needs it");
  STD_TORCH_CHECK(!window.has_value() || *window >= 1, "window is ", *window, ", expected at least 1");
  STD_TORCH_CHECK(!softcap.has_value() || *softcap > 0, "softcap is ", *softcap, ", expected more than 0");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && values.scalar_type() == q.scalar_type(),
                  "q, k and values differ in dtype");
  const AttentionKernels* picked = pick_attention_kernels(kind_of("q", q.scalar_type(), precision));
  check_instructions(picked != nullptr, "precision");
  const AttentionKernels& kernels = *picked;

  const auto double_of = [](const std::optional<Tensor>& x) { return contiguous_as(x, ScalarType::Double); };
  const std::optional<Tensor> given = double_of(lse), before = double_of(transposed ? post : pre),
                              after = double_of(transposed ? pre : post), there = contiguous_as(mask, ScalarType::Bool);
  const bool wide = q.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(values, {S, B, transposed ? Hkv : H, T, s},
                                        wide ? ScalarType::Double : ScalarType::Float);
  Tensor found = torch::stable::new_empty(q, {given.has_value() ? 0 : B, H, T}, ScalarType::Double);
  const Tensor &to = transposed ? k : q, &from = transposed ? q : k;
  AttentionArguments a{};
  a.to = view(to, transposed, a.to_stride);
  a.from = view(from, transposed, a.from_stride);
  a.values = view(values, transposed, a.value_stride);
  a.out = view(out, transposed, a.out_stride);
  a.lse = static_cast<double*>((given.has_value() ? *given : found).data_ptr());
  a.before = data_of<double>(before);
  a.after = data_of<double>(after);
  a.mask = data_of<uint8_t>(there);
  a.batches = B;
  a.heads_to = to.size(1);
  a.heads_from = from.size(1);
  a.positions = T;
  a.rank = r;
  a.streams = S;
  a.width = s;
  a.window = std::min(window.value_or(T), T);
  a.scale = scale;
  a.softcap = softcap.value_or(0);
  a.find_lse = !given.has_value();
  a.transposed = transposed;
  if (B * H * T > 0) attend(a, kernels);
  return {out, found};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("frozen_attention", TORCH_BOX(&fc::cpu::frozen_attention)); }

#endif
