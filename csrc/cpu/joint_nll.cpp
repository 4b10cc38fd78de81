// joint_nll on the CPU: what sweep_nll gives, for pairs of ablations whose changes of the logits add up. The products
// of all single ablations with a stripe of the vocabulary stay in the L2 cache, where the pairs read them: a pair costs
// an addition, a polynomial and a sum for each logit.
#include "effects.h"

namespace fc::cpu {

struct Pair {  // of single ablations
  int64_t first, second;
  int64_t place;  // in the results
};

struct JointArguments : EffectArguments {  // its inputs are those of the single ablations
  const Pair* sorted;                      // [P], by the first
  int64_t pairs;                           // P
};

using JointTask = void (*)(const JointArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

template <class Scheme, class Source>
struct Joint : Effects<Scheme, Source> {
  using Base = Effects<Scheme, Source>;
  using Base::kL, Base::kW, Base::sweep, Base::cells, Base::cell_count;
  using T = typename Scheme::Accumulator;

  const JointArguments& s;
  const int64_t singles = s.inputs.pairs;
  const int64_t row_count = sweep.blocks * kRows, panel_size = row_count * kW;
  Buffer<T> products{kPanelsAStripe * panel_size};  // of a stripe, [panel][row][kW]
  Buffer<T> reach{kPanelsAStripe * row_count};      // bounds on them, [panel][row]
  Buffer<T> length{row_count};                      // of each row of delta, at least
  Buffer<int64_t> row_of{sweep.window * singles};   // [position][single]
  Buffer<int64_t> single_of{row_count};             // -1 for the rows that fill a block
  Buffer<double> exact{cells.count * singles};      // products of cells, [cell][single]
  Buffer<EffectSums> sums{sweep.window * s.pairs};  // [position][pair]

  Joint(const JointArguments& s, const Block& block) : Base(s, block, false), s(s) {
    for (int64_t i = 0; i < sums.count; ++i) sums.data[i] = {};
  }

  void row(int64_t i, int64_t single, int64_t t, T longest) {
    length.data[i] = longest;
    single_of.data[i] = single;
    if (single >= 0) row_of.data[(t - sweep.block.first_position) * singles + single] = i;
  }

  T* place(T*, int64_t block, int64_t panel) const { return products.data + panel * panel_size + block * kRows * kW; }
  bool plain(int64_t) const { return true; }
  template <bool kPlain>
  [[gnu::always_inline]] void consume(const SweepTile<T>& tile, int i) {
    const int64_t row = tile.block * kRows + i;
    reach.data[tile.panel / kTogether * row_count + row] = length.data[row] * tile.longest;
  }

  void group_done(const SweepGroup<Scheme>& group) {
    this->for_cells(group, [&](const Cell& cell, int64_t row, double product) {
      exact.data[(&cell - cells.data) * singles + single_of.data[row]] = product;
    });
  }

  void stripe_done(int64_t first, int64_t columns) {
    for (int64_t t = 0; t < sweep.window; ++t) {
      look_for_interrupt();
      if (s.cap == 0 && !s.with_mean)
        add_pairs<true>(t, first, columns);
      else
        add_pairs<false>(t, first, columns);
    }
    for (int64_t c = 0; c < cell_count; ++c) {
      const Cell& cell = cells.data[c];
      const double* of_singles = exact.data + c * singles;
      for (int64_t p = 0; p < s.pairs; ++p) {
        const auto [one, other, place] = s.sorted[p];
        const int64_t out = place * s.inputs.positions + sweep.block.first_position + cell.position;
        this->settle(sums.data[cell.position * s.pairs + p], cell, out, first, of_singles[one] + of_singles[other]);
      }
    }
    cell_count = 0;
  }

  // Adds a stripe to the sums of all pairs at one position.
  // kPlain: no cap, no mean asked for.
  template <bool kPlain>
  void add_pairs(int64_t t, int64_t first, int64_t columns) {
    const int64_t across = panels_of<Scheme>(columns);
    for (int64_t p = 0; p < s.pairs; ++p) {
      const Pair& pair = s.sorted[p];
      const int64_t one = row_of.data[t * singles + pair.first], other = row_of.data[t * singles + pair.second];
      EffectSums& sum = sums.data[t * s.pairs + p];
      Vec<T> small{};
      EffectLanes<T> lanes{};
      for (int64_t panel = 0; panel < across; panel += kTogether) {
        const T* bounds = reach.data + panel / kTogether * row_count;
        const T* start = products.data + panel * panel_size;
        const RowOfPair<kPlain> row{*this, sum, pair, start + one * kW, start + other * kW, t, panel, first, columns};
        this->template add<!kPlain>(sum, small, lanes, bounds[one] + bounds[other], t, panel,
                                    smaller(kTogether, across - panel), row);
      }
      Base::flush(sum, small, lanes);
    }
  }

  // A pair at a position, in one tile, as Effects::add sees it.
  template <bool kPlain>
  struct RowOfPair {
    const Joint& op;
    EffectSums& sum;
    const Pair& pair;
    const T *one, *other;  // products with the tile's first panel
    const int64_t t, first_panel, first, columns;

    [[gnu::always_inline]] void changes(Vec<T> (&x)[kVectors], int64_t panel) const {
      for (int j = 0; j < kVectors; ++j)
        x[j] = load(one + panel * op.panel_size + j * kL) + load(other + panel * op.panel_size + j * kL);
      if (!kPlain) op.change(x, T(1), T(0), (first_panel + panel) * op.sweep.window + t);
    }
    [[gnu::noinline]] void full(int64_t panel) const {
      double products[kW] = {};
      const int64_t at = (first_panel + panel) * kW, here = smaller(kW, columns - at);
      op.multiply_pair(products, pair, t, first + at, here);
      op.add_full(sum, products, {}, t, first + at, here,
                  op.probable.data[(first_panel + panel) * op.sweep.window + t]);
    }
  };

  // The products of both ablations in fp64, from the tensors as they were given.
  void multiply_pair(double (&products)[kW], const Pair& pair, int64_t t, int64_t first, int64_t here) const {
    const SweepInputs& inputs = s.inputs;
    for (const int64_t single : {pair.first, pair.second}) {
      const Source* z =
          inputs.delta.template at<Source>(single) + (sweep.block.first_position + t) * inputs.delta.stride[1];
      const Source* columns = inputs.basis.template at<Source>(inputs.group[single]) + first * inputs.basis.stride[2];
      Base::multiply_given(
          products, [&](int64_t k) { return static_cast<double>(widen(z[k * inputs.delta.stride[2]])); }, inputs.rank,
          columns, inputs.basis.stride + 1, here);
    }
  }

  static JointTask kernels() {
    return [](const JointArguments& s, const Block& block) { Joint(s, block).run(); };
  }

  void run() {
    sweep.run(*this);
    for (int64_t t = 0; t < sweep.window; ++t)
      for (int64_t p = 0; p < s.pairs; ++p) {
        EffectSums& sum = sums.data[t * s.pairs + p];
        EffectTotals& totals = s.totals[s.sorted[p].place * s.inputs.positions + sweep.block.first_position + t];
        totals = Base::totals_of(sum);
        if (!is_raised(totals)) continue;
        this->make_anew(sum, {}, t, 0, s.inputs.vocabulary, [&](double (&products)[kW], int64_t first, int64_t here) {
          multiply_pair(products, s.sorted[p], t, first, here);
        });
        totals = Base::totals_of(sum);
      }
  }
};

}  // namespace

JointTask joint_nll(Arithmetic arithmetic) { return select<Joint>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(JointTask, joint_nll, Arithmetic)

namespace {

// All singles are in every task; packed, with their products with a stripe, they fill half the L2 cache. Shorter tasks
// would pack every basis more often, which costs more than what spills into the L3 cache.
TilePlan plan_joint(int64_t singles, int64_t positions, int64_t row_bytes, int64_t threads) {
  if (positions == 0) return {1, 1, 0};
  const int64_t longest = std::clamp<int64_t>(caches().l2 / 2 / std::max<int64_t>(row_bytes * singles, 1), 1, 64);
  TilePlan plan{std::max<int64_t>(singles, 1), even_block(positions, longest), 0};
  // As many blocks for every thread, two at least.
  const int64_t blocks = std::max(ceil_div(ceil_div(positions, plan.position_block), threads), int64_t{2}) * threads;
  plan.position_block = std::min(plan.position_block, std::max<int64_t>(ceil_div(positions, blocks), 8));
  plan.tasks = ceil_div(positions, plan.position_block);
  return plan;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> joint_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                                     const Tensor& tokens, const Tensor& group, const Tensor& pairs,
                                                     const Tensor& clean_lse, bool mean, const std::string& precision,
                                                     std::optional<double> cap) {
  Sizes sizes = check_effects(base, delta, basis, tokens, group, clean_lse, cap);
  sizes("pairs", pairs, "N 2", Kind::index);
  FC_CHECK(sizes["P"] > 0 || sizes["N"] == 0, "pairs has shape ", shape_of(pairs), ", but delta ", shape_of(delta),
           " holds no ablation");
  const int64_t S = sizes["P"], P = sizes["N"], r = sizes["r"];
  const JointTask task = pick(pick_joint_nll, "base", base, precision);

  EffectTensors tensors(inputs_of(base, delta, basis, group), base, P, tokens, clean_lse, mean);
  const Tensor pairs_c = torch::stable::contiguous(pairs);
  const auto* given = data_of<const int64_t>(pairs_c);
  check_indices("pairs", given, 2 * P, S, 2);
  std::vector<Pair> sorted;
  for (int64_t p = 0; p < P; ++p) sorted.push_back({given[2 * p], given[2 * p + 1], p});
  std::stable_sort(sorted.begin(), sorted.end(), [](const Pair& a, const Pair& b) { return a.first < b.first; });

  const JointArguments arguments{tensors.arguments(cap), sorted.data(), P};
  if (P == 0) return tensors.results();
  // Of a single: its packed row and its products with a stripe.
  const int64_t row_bytes =
      r * static_cast<int64_t>(base.element_size()) + kPanelsAStripe * panel_bytes(current_tier());
  run_blocks(arguments, task, plan_joint(S, sizes["T"], row_bytes, torch::stable::get_num_threads()));
  return tensors.results();
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("joint_nll", TORCH_BOX(&fc::cpu::joint_nll)); }

#endif
