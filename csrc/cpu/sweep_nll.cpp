// sweep_nll on the CPU: the epilogue sums exponentials of each tile's logits, so that logits never reach memory.
// Rows are (ablation, position) pairs and independent of each other: a result does not depend on threads or blocking.
#include <cstdint>

#include "dispatch.h"

namespace fc::cpu {

struct SweepArguments {
  const void *base, *delta, *basis;  // [T,V], [P,T,r], [G,r,V] of one type, any strides
  int64_t base_stride[2], delta_stride[3], basis_stride[3];
  const int64_t* tokens;          // [T,K]; outside [0, V): absent from this vocabulary slice
  const int64_t* group;           // [P]
  const int64_t* order;           // [P]: ablations sorted by group
  const double* scale;            // [P,T] or null
  const double* clean_lse;        // [T] or null
  double cap;                     // logits x become cap * tanh(x / cap); 0: they do not
  double *lse, *picked, *change;  // [P,T], [P,T,K], [P,T] or null
  int64_t pairs, positions, vocabulary, rank, choices;
};

struct Block {
  int64_t first_pair, end_pair, first_position, end_position;  // pairs index `order`
};

using SweepTask = void (*)(const SweepArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cmath>
#include <limits>

#include "exp.h"
#include "tile.h"

namespace fc::cpu::FC_TIER {
namespace {

// Exponents are taken from a row's reference value, raised only when a logit exceeds it by this much: sums stay far
// from overflow and the exp of a logit near the maximum loses nothing.
constexpr double kSlack = 8;
constexpr int64_t kPanelsAStripe = 4;   // packed together: long reads of base and basis
constexpr int64_t kStripesAFlush = 16;  // lanes hold at most 192 addends before they join the fp64 total

template <class T>
struct Row {  // one (ablation, position)
  T reference;
  T scale;
  int64_t out;  // index into [P,T]; negative for the rows that fill a block
  int64_t position;
  double total, change;
};

// A logit is above the slack, or NaN: raise the reference and rescale what was summed so far.
template <class T>
[[gnu::noinline]] void raise(Row<T>& row, Vec<T>& lanes, const T* logits, int64_t count) {
  T highest = row.reference;
  for (int64_t j = 0; j < count; ++j) {
    if (logits[j] != logits[j]) row.total = std::numeric_limits<double>::quiet_NaN();
    if (logits[j] > highest) highest = logits[j];
  }
  const double factor = std::exp(static_cast<double>(row.reference) - static_cast<double>(highest));
  row.total *= factor;
  lanes *= static_cast<T>(factor);
  row.reference = highest;
}

// Fetches the next stripe of a matrix into the L2 cache a few lines at a time, while this one is worked on: its rows
// lie pages apart, which no hardware prefetcher follows.
struct Ahead {
  const char* row;
  int64_t stride, width, rows;  // bytes, bytes, count
  int64_t done = 0;

  void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + done, 0, 2);
      done += 64;
      if (done < width) continue;
      done = 0, row += stride, --rows;
    }
  }
};

template <class Scheme, class Source>
struct Sweep {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;

  const SweepArguments& s;
  const Block& block;
  const int64_t window = block.end_position - block.first_position;
  const int64_t blocks = count_blocks();
  const int64_t depth = steps<Scheme>(s.rank);
  Buffer<typename Scheme::Left> left{blocks * kRows * depth};
  Buffer<typename Scheme::Right> panels{kPanelsAStripe * kW * depth};
  Buffer<T> base{kPanelsAStripe * kW * window};
  Buffer<T> clean{s.clean_lse ? kPanelsAStripe * kW * window : 0};  // probabilities of the clean run
  Buffer<Row<T>> rows{blocks * kRows};
  Buffer<Vec<T>> lanes{blocks * kRows};
  Buffer<Vec<T>> change_lanes{s.clean_lse ? blocks * kRows : 0};

  // Ablations first..end of `order` that share a group.
  int64_t group_end(int64_t first) const {
    int64_t end = first;
    while (end < block.end_pair && s.group[s.order[end]] == s.group[s.order[first]]) ++end;
    return end;
  }

  int64_t count_blocks() const {
    int64_t total = 0;
    for (int64_t i = block.first_pair, end; i < block.end_pair; i = end) {
      end = group_end(i);
      total += ((end - i) * window + kRows - 1) / kRows;
    }
    return total;
  }

  void pack_rows() {
    const auto* delta = static_cast<const Source*>(s.delta);
    std::memset(static_cast<void*>(left.data), 0, left.bytes());
    int64_t i = 0;
    for (int64_t first = block.first_pair, end; first < block.end_pair; first = end) {
      end = group_end(first);
      // Positions outermost: a row of clean logits stays in the L1 cache for all the ablations that start from it.
      for (int64_t t = block.first_position; t < block.end_position; ++t) {
        for (int64_t o = first; o < end; ++o, ++i) {
          const int64_t p = s.order[o], out = p * s.positions + t;
          pack_left<Scheme>(left.data + i / kRows * kRows * depth, static_cast<int>(i % kRows),
                            delta + p * s.delta_stride[0] + t * s.delta_stride[1], s.rank, s.delta_stride[2]);
          rows.data[i] = fresh(out, t, s.scale ? static_cast<T>(s.scale[out]) : T(1));
        }
      }
      for (; i % kRows != 0; ++i) rows.data[i] = fresh(-1, block.first_position, T(1));
    }
    std::memset(static_cast<void*>(lanes.data), 0, lanes.bytes());
    std::memset(static_cast<void*>(change_lanes.data), 0, change_lanes.bytes());
    for (int64_t j = 0; j < i; ++j)
      for (int64_t c = 0; c < s.choices && rows.data[j].out >= 0; ++c) s.picked[rows.data[j].out * s.choices + c] = 0;
  }

  static Row<T> fresh(int64_t out, int64_t position, T scale) {
    return {std::numeric_limits<T>::lowest(), scale, out, position, 0.0, 0.0};
  }

  // The clean logits of a stripe as [panel][position][kW], and their probabilities where a change is asked for.
  void pack_base(int64_t first, int64_t columns) {
    const auto* source = static_cast<const Source*>(s.base) + first * s.base_stride[1];
    for (int64_t t = 0; t < window; ++t) {
      const Source* row = source + (block.first_position + t) * s.base_stride[0];
      for (int64_t panel = 0; panel * kW < columns; ++panel) {
        const int64_t here = columns - panel * kW < kW ? columns - panel * kW : kW;
        T* __restrict out = base.data + (panel * window + t) * kW;
        with_stride(s.base_stride[1], [&](auto stride) {
          for (int64_t j = 0; j < here; ++j) out[j] = widen(row[(panel * kW + j) * stride]);
        });
        for (int64_t j = here; j < kW; ++j) out[j] = 0;
        if (s.clean_lse != nullptr) pack_probabilities(panel * window + t, here);
      }
    }
  }

  Vec<T> capped(Vec<T> x) const {
    const T cap = static_cast<T>(s.cap);
    return cap * hyperbolic_tangent<T>(x / cap);
  }

  void pack_probabilities(int64_t row, int64_t here) {
    const T* uncapped = base.data + row * kW;
    T logits[kW];
    for (int j = 0; j < kVectors; ++j)
      store(logits + j * kL, s.cap > 0 ? capped(load(uncapped + j * kL)) : load(uncapped + j * kL));
    T* out = clean.data + row * kW;
    const double lse = s.clean_lse[block.first_position + row % window];
    const T high = static_cast<T>(lse), low = static_cast<T>(lse - static_cast<double>(high));
    for (int j = 0; j < kVectors; ++j) store(out + j * kL, exponential<T>(load(logits + j * kL) - high - low));
    for (int64_t j = 0; j < kW; ++j)  // exp() ends above zero; a masked logit has probability zero
      if (j >= here || logits[j] == -std::numeric_limits<T>::infinity()) out[j] = 0;
  }

  // A tile of products that waits to be consumed, and where it lies.
  struct Tile {
    T* products;          // [kRows][kW], in the L1 cache
    int64_t block;        // of rows; negative: none waits
    int64_t panel_row;    // row of `base` that holds the panel's position 0
    int64_t first, here;  // its columns; those past `here` are padding
  };

  // Row i of a tile: adds the clean logits, then the exponentials to the row's sum. The products become logits in place
  // where something else has to read them.
  // kPlain: whole panels, no scale, no cap, no change asked for. Inlined: a call would spill the accumulators it runs
  // beside.
  template <bool kPlain>
  [[gnu::always_inline]] void consume(const Tile& tile, int i) {
    const int64_t index = tile.block * kRows + i, here = tile.here;
    Row<T>& row = rows.data[index];
    T* products = tile.products + i * kW;
    const int64_t base_row = (tile.panel_row + row.position) * kW;
    const T* start = base.data + base_row;
    Vec<T> x[kVectors], moved[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      moved[j] = load(products + j * kL);
      x[j] = load(start + j * kL) + moved[j];
    }
    if (!kPlain && s.scale != nullptr)
      for (int j = 0; j < kVectors; ++j) {
        x[j] *= row.scale;
        moved[j] = x[j] - load(start + j * kL);
      }
    if (!kPlain && s.cap > 0)
      for (int j = 0; j < kVectors; ++j) {
        x[j] = capped(x[j]);
        if (s.clean_lse != nullptr) moved[j] = x[j] - capped(load(start + j * kL));
      }
    if (!kPlain && here < kW) {
      for (int j = 0; j < kVectors; ++j) store(products + j * kL, x[j]);
      for (int64_t j = here; j < kW; ++j) products[j] = -std::numeric_limits<T>::infinity();
      for (int j = 0; j < kVectors; ++j) x[j] = load(products + j * kL);
    }
    if (any_above(x, broadcast<T>(row.reference + T(kSlack)))) {
      for (int j = 0; j < kVectors; ++j) store(products + j * kL, x[j]);
      raise<T>(row, lanes.data[index], products, here);
    }
    const Vec<T> reference = broadcast<T>(row.reference);
    Vec<T> added = exponential<T>(x[0] - reference);
    for (int j = 1; j < kVectors; ++j) added += exponential<T>(x[j] - reference);
    lanes.data[index] += added;
    if (!kPlain && s.clean_lse != nullptr) {
      Vec<T> sum{};
      for (int j = 0; j < kVectors; ++j) {
        const Vec<T> p = load(clean.data + base_row + j * kL);
        sum += p > 0 ? p * moved[j] : Vec<T>{};
      }
      change_lanes.data[index] += sum;
    }
    const int64_t* tokens = s.tokens + row.position * s.choices;
    for (int64_t c = 0; c < s.choices; ++c) {
      const auto offset = static_cast<uint64_t>(tokens[c] - tile.first);
      if (offset >= static_cast<uint64_t>(here) || row.out < 0) continue;
      for (int j = 0; j < kVectors; ++j) store(products + j * kL, x[j]);
      s.picked[row.out * s.choices + c] = products[offset];
    }
  }

  // Block times panel, while the tile before is consumed. Not inlined: the accumulators need every register.
  template <bool kPlain>
  [[gnu::noinline]] void advance(const Tile waiting, T* products, int64_t b, int64_t panel) {
    multiply<Scheme>(products, left.data + b * kRows * depth, panels.data + panel * kW * depth, depth, FromZero{},
                     [&](int i) __attribute__((always_inline)) {
                       if (waiting.block >= 0) consume<kPlain>(waiting, i);
                     });
  }

  // The stripe of `columns` columns from `first` on of a matrix whose rows lie `stride` apart; none past the
  // vocabulary.
  Ahead ahead(const Source* matrix, int64_t stride, int64_t count, int64_t first) const {
    const auto size = static_cast<int64_t>(sizeof(Source));
    const int64_t columns = s.vocabulary - first < kPanelsAStripe * kW ? s.vocabulary - first : kPanelsAStripe * kW;
    return {reinterpret_cast<const char*>(matrix + first), stride * size, columns * size, columns > 0 ? count : 0};
  }

  void stripe(int64_t first, int64_t columns) {
    alignas(64) T tiles[2][kRows * kW];
    Tile waiting{tiles[1], -1, 0, 0, 0};
    const auto* clean_rows = static_cast<const Source*>(s.base) + block.first_position * s.base_stride[0];
    Ahead next_base = ahead(clean_rows, s.base_stride[0], s.base_stride[1] == 1 ? window : 0, first + columns);
    int64_t done = 0;  // blocks of the groups before this one
    for (int64_t o = block.first_pair, end; o < block.end_pair; o = end) {
      end = group_end(o);
      const auto* basis = static_cast<const Source*>(s.basis) + s.group[s.order[o]] * s.basis_stride[0];
      pack_right<Scheme>(panels.data, basis + first * s.basis_stride[2], s.rank, columns, s.basis_stride[1],
                         s.basis_stride[2]);
      Ahead next_basis = ahead(basis, s.basis_stride[1], s.basis_stride[2] == 1 ? s.rank : 0, first + columns);
      const int64_t mine = ((end - o) * window + kRows - 1) / kRows;
      for (int64_t panel = 0; panel * kW < columns; ++panel) {
        const int64_t here = columns - panel * kW < kW ? columns - panel * kW : kW;
        const bool plain = s.scale == nullptr && s.clean_lse == nullptr && s.cap == 0 && columns % kW == 0;
        for (int64_t b = done; b < done + mine; ++b) {
          next_base.fetch(4);
          next_basis.fetch(2);
          T* products = waiting.products == tiles[0] ? tiles[1] : tiles[0];
          if (plain)
            advance<true>(waiting, products, b, panel);
          else
            advance<false>(waiting, products, b, panel);
          waiting = {products, b, panel * window - block.first_position, first + panel * kW, here};
        }
      }
      done += mine;
    }
    for (int i = 0; i < kRows && waiting.block >= 0; ++i) consume<false>(waiting, i);
  }

  void flush() {
    for (int64_t i = 0; i < blocks * kRows; ++i) {
      Row<T>& row = rows.data[i];
      if (row.reference < std::numeric_limits<T>::infinity()) row.total += sum<T>(lanes.data[i]);
      lanes.data[i] = Vec<T>{};
      if (s.clean_lse == nullptr) continue;
      row.change += sum<T>(change_lanes.data[i]);
      change_lanes.data[i] = Vec<T>{};
    }
  }

  void finish() {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < blocks * kRows; ++i) {
      const Row<T>& row = rows.data[i];
      if (row.out < 0) continue;
      double lse = static_cast<double>(row.reference) + std::log(row.total);
      if (row.reference == infinity)
        lse = row.total == row.total ? infinity : row.total;
      else if (row.total < 0.5)  // the maximum alone counts 1: every logit is -inf
        lse = -infinity;
      s.lse[row.out] = lse;
      if (s.change != nullptr) s.change[row.out] = row.change;
    }
  }

  void run() {
    pack_rows();
    const int64_t width = kPanelsAStripe * kW;
    int64_t stripes = 0;
    for (int64_t first = 0; first < s.vocabulary; first += width) {
      const int64_t columns = s.vocabulary - first < width ? s.vocabulary - first : width;
      pack_base(first, columns);
      stripe(first, columns);
      if (++stripes % kStripesAFlush == 0) flush();
    }
    flush();
    finish();
  }
};

template <class Scheme, class Source>
void run(const SweepArguments& s, const Block& block) {
  Sweep<Scheme, Source>{s, block}.run();
}

}  // namespace

// Null where this tier has no such instruction.
SweepTask sweep_nll(Kind kind) {
  switch (kind) {
    case Kind::fp32:
      return run<Ieee<float>, float>;
    case Kind::fp64:
      return run<Ieee<double>, double>;
    case Kind::bf16_inputs:
      return run<Ieee<float>, BFloat16>;
#if defined(__AVX512BF16__)
    case Kind::fp32_by_bf16:
      return run<Bf16Dot, float>;
    case Kind::bf16_by_bf16:
      return run<Bf16Dot, BFloat16>;
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
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../plan.h"
#include "../sweep_nll.h"

namespace fc::cpu {

FC_TIERS(SweepTask, sweep_nll, Kind)

namespace {

using torch::headeronly::ScalarType;

Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

std::tuple<Tensor, Tensor, Tensor> sweep_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                             const Tensor& tokens, const Tensor& group,
                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& clean_lse,
                                             const std::string& precision, std::optional<double> cap) {
  const auto [P, T, V, r, G, K] = check_sweep(base, delta, basis, tokens, group, scale, clean_lse, cap);
  const SweepTask task = pick_sweep_nll(kind_of("base", base.scalar_type(), precision));
  check_instructions(task != nullptr, "precision");

  const auto fp64 = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(base, size, ScalarType::Double);
  };
  Tensor lse = fp64({P, T}), picked = fp64({P, T, K}), change = fp64({clean_lse.has_value() ? P : 0, T});
  const Tensor tokens_c = torch::stable::contiguous(tokens), group_c = torch::stable::contiguous(group);
  std::optional<Tensor> scale_c, clean_c;
  if (scale.has_value()) scale_c = contiguous_as(*scale, ScalarType::Double);
  if (clean_lse.has_value()) clean_c = contiguous_as(*clean_lse, ScalarType::Double);

  const auto* groups = static_cast<const int64_t*>(group_c.data_ptr());
  for (int64_t p = 0; p < P; ++p)
    STD_TORCH_CHECK(groups[p] >= 0 && groups[p] < G, "group[", p, "] is ", groups[p], ", expected 0 to ", G - 1);
  std::vector<int64_t> order(static_cast<size_t>(P));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });

  const SweepArguments arguments{
      .base = base.data_ptr(),
      .delta = delta.data_ptr(),
      .basis = basis.data_ptr(),
      .base_stride = {base.stride(0), base.stride(1)},
      .delta_stride = {delta.stride(0), delta.stride(1), delta.stride(2)},
      .basis_stride = {basis.stride(0), basis.stride(1), basis.stride(2)},
      .tokens = static_cast<const int64_t*>(tokens_c.data_ptr()),
      .group = groups,
      .order = order.data(),
      .scale = scale_c.has_value() ? static_cast<const double*>(scale_c->data_ptr()) : nullptr,
      .clean_lse = clean_c.has_value() ? static_cast<const double*>(clean_c->data_ptr()) : nullptr,
      .cap = cap.value_or(0),
      .lse = static_cast<double*>(lse.data_ptr()),
      .picked = static_cast<double*>(picked.data_ptr()),
      .change = clean_c.has_value() ? static_cast<double*>(change.data_ptr()) : nullptr,
      .pairs = P,
      .positions = T,
      .vocabulary = V,
      .rank = r,
      .choices = K};

  const TilePlan plan =
      plan_tiles(P, T, r * static_cast<int64_t>(base.element_size()), torch::stable::get_num_threads());
  const int64_t across = plan.tasks ? ceil_div(T, plan.position_block) : 1;
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / across * plan.pair_block, t = i % across * plan.position_block;
      task(arguments, {p, std::min(p + plan.pair_block, P), t, std::min(t + plan.position_block, T)});
    }
  });
  return {lse, picked, change};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("sweep_nll", TORCH_BOX(&fc::cpu::sweep_nll)); }

#endif
