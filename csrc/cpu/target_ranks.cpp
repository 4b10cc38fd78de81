// target_ranks on the CPU: how many logits of each (ablation, position) are above its threshold, the target's own
// aside. The epilogue compares each tile's logits with one threshold a row and counts.
#include "sweep.h"

namespace fc::cpu {

struct RankedArguments {
  SweepInputs inputs;
  const int64_t* tokens;     // [T]: not to be counted
  const double* thresholds;  // [P,T]
  int64_t* ranks;            // [P,T]
};

using RankTask = void (*)(const RankedArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cmath>
#include <limits>

namespace fc::cpu::FC_TIER {
namespace {

// The largest number of type T not above x: a logit of that type exceeds it exactly where it exceeds x.
template <class T>
T rounded_down(double x) {
  const T nearest = static_cast<T>(x);
  return static_cast<double>(nearest) > x ? std::nextafter(nearest, -std::numeric_limits<T>::infinity()) : nearest;
}

template <class T>
struct RankedRow {  // one (ablation, position)
  T threshold;
  int64_t out;  // index into [P,T]; negative for the rows that fill a block
  int64_t position, token, count;
};

template <class Scheme, class Source>
struct TargetRanks : Epilogue {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static_assert(kW < 64);  // a bit for each column

  const RankedArguments& s;
  Sweep<Scheme, Source> sweep;
  Buffer<RankedRow<T>> rows{sweep.blocks * kRows};

  TargetRanks(const RankedArguments& s, const Block& block) : s(s), sweep{s.inputs, block} {}

  void row(int64_t i, int64_t p, int64_t t, T) {
    const int64_t out = p < 0 ? -1 : p * s.inputs.positions + t;
    rows.data[i] = {out < 0 ? T(0) : rounded_down<T>(s.thresholds[out]), out, t - sweep.block.first_position,
                    s.tokens[t], 0};
  }

  bool plain(int64_t columns) const { return columns % kW == 0; }

  template <bool kPlain>
  [[gnu::always_inline]] void consume(const SweepTile<T>& tile, int i) {
    RankedRow<T>& row = rows.data[tile.block * kRows + i];
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      const T* start = sweep.base.data + ((tile.panel + panel) * sweep.window + row.position) * kW;
      const T* products = tile.products + panel * tile.stride + i * kW;
      const int64_t here = tile.columns_of(panel, kW);
      Vec<T> x[kVectors];
      for (int j = 0; j < kVectors; ++j) x[j] = load(start + j * kLanes<T>) + load(products + j * kLanes<T>);
      uint64_t above = lanes_above<false>(x, broadcast<T>(row.threshold));
      if (!kPlain) above &= (uint64_t{1} << here) - 1;
      const auto offset = static_cast<uint64_t>(row.token - tile.first - panel * kW);
      if (offset < static_cast<uint64_t>(here)) above &= ~(uint64_t{1} << offset);
      row.count += __builtin_popcountll(above);
    }
  }

  static RankTask kernels() {
    return [](const RankedArguments& s, const Block& block) { TargetRanks(s, block).run(); };
  }

  void run() {
    sweep.run(*this);
    for (int64_t i = 0; i < sweep.blocks * kRows; ++i)
      if (rows.data[i].out >= 0) s.ranks[rows.data[i].out] = rows.data[i].count;
  }
};

}  // namespace

RankTask target_ranks(Arithmetic arithmetic) { return select<TargetRanks>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(RankTask, target_ranks, Arithmetic)

namespace {

Tensor target_ranks(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& tokens,
                    const Tensor& group, const Tensor& thresholds, const std::string& precision) {
  Sizes sizes = check_sweep(base, delta, basis, group);
  sizes("tokens", tokens, "T", Kind::index);
  sizes("thresholds", thresholds, "P T", Kind::float64);
  const int64_t P = sizes["P"], T = sizes["T"], r = sizes["r"];
  const RankTask task = pick(pick_target_ranks, "base", base, precision);

  Tensor ranks = torch::stable::new_empty(base, {P, T}, ScalarType::Long);
  const Tensor tokens_c = torch::stable::contiguous(tokens), thresholds_c = torch::stable::contiguous(thresholds);
  const OwnedInputs inputs = inputs_of(base, delta, basis, group);
  const RankedArguments arguments{inputs.view, data_of<const int64_t>(tokens_c), data_of<const double>(thresholds_c),
                                  data_of<int64_t>(ranks)};
  const int64_t depth_bytes = r * static_cast<int64_t>(base.element_size());
  run_blocks(arguments, task, plan_tiles(P, T, depth_bytes, torch::stable::get_num_threads(), caches().l2));
  return ranks;
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("target_ranks", TORCH_BOX(&fc::cpu::target_ranks)); }

#endif
