// joint_nll on the CPU: what sweep_nll gives, for pairs of ablations whose changes of the logits add up. The products
// of all single ablations with a stripe of the vocabulary stay in the L2 cache, where the pairs read them: a pair costs
// an addition, an exponential and a sum for each logit, and no multiplication.
#include "nll.h"

namespace fc::cpu {

struct Pair {  // of single ablations
  int64_t first, second;
  int64_t place;  // in the results
};

struct JointArguments : NllArguments {  // its inputs are those of the single ablations
  const Pair* sorted;                   // [P], by the first
  int64_t pairs;                        // P
};

using JointTask = void (*)(const JointArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

template <class T>
struct JointRow {  // one (pair, position)
  ExpSum<T> sum;
  double change;
};

template <class Scheme, class Source>
struct Joint : NllEpilogue<Scheme, Source> {
  using Base = NllEpilogue<Scheme, Source>;
  using Base::clean, Base::kL, Base::kW, Base::sweep;
  using T = typename Scheme::Accumulator;

  const JointArguments& s;
  const int64_t panel_size = sweep.blocks * kRows * kW;
  Buffer<T> products{kPanelsAStripe * panel_size};        // of a stripe, [panel][row][kW]
  Buffer<int64_t> row_of{sweep.window * s.inputs.pairs};  // [position][single]
  Buffer<JointRow<T>> rows{sweep.window * s.pairs};       // [position][pair]

  Joint(const JointArguments& s, const Block& block) : Base(s, block), s(s) {
    for (int64_t i = 0; i < rows.count; ++i) rows.data[i] = {{}, 0.0};
  }

  void row(int64_t i, int64_t single, int64_t t) {
    if (single >= 0) row_of.data[(t - sweep.block.first_position) * s.inputs.pairs + single] = i;
  }

  T* place(T*, int64_t block, int64_t panel) const { return products.data + panel * panel_size + block * kRows * kW; }
  bool plain(int64_t) const { return true; }
  template <bool kPlain>
  void consume(const SweepTile<T>&, int) const {}

  void stripe_done(int64_t first, int64_t columns) {
    const bool plain = s.clean_lse == nullptr && s.cap == 0 && columns % kW == 0;
    for (int64_t t = 0; t < sweep.window; ++t) {
      look_for_interrupt();
      pick(t, first, columns);
      if (plain)
        add_pairs<true>(t, columns);
      else
        add_pairs<false>(t, columns);
    }
  }

  // Products of ablation i at position t, from the first panel on.
  const T* product(int64_t t, int64_t i) const { return products.data + row_of.data[t * s.inputs.pairs + i] * kW; }

  void pick(int64_t t, int64_t first, int64_t columns) {
    const int64_t position = sweep.block.first_position + t;
    for (int64_t c = 0; c < s.tokens_per_position; ++c) {
      const auto offset = static_cast<uint64_t>(s.tokens[position * s.tokens_per_position + c] - first);
      if (offset >= static_cast<uint64_t>(columns)) continue;
      const int64_t panel = static_cast<int64_t>(offset) / kW, j = static_cast<int64_t>(offset) % kW;
      const T start = sweep.base.data[(panel * sweep.window + t) * kW + j];
      for (int64_t p = 0; p < s.pairs; ++p) {
        const auto [one, other, place] = s.sorted[p];
        const int64_t at = panel * panel_size + j, out = place * s.inputs.positions + position;
        const T logit = start + product(t, one)[at] + product(t, other)[at];
        s.picked[out * s.tokens_per_position + c] = s.cap > 0 ? capped<T>(broadcast<T>(logit), s.cap)[0] : logit;
      }
    }
  }

  // Adds a stripe's exponentials to the sums of all pairs at one position.
  // kPlain: whole panels, no cap, no change asked for.
  template <bool kPlain>
  void add_pairs(int64_t t, int64_t columns) {
    alignas(64) T begun[kPanelsAStripe * kW], scratch[kW];  // begun: the clean logits and a pair's first ablation
    for (int64_t p = 0; p < s.pairs; ++p) {
      const T *one = product(t, s.sorted[p].first), *other = product(t, s.sorted[p].second);
      JointRow<T>& row = rows.data[t * s.pairs + p];
      Vec<T> lanes{}, change{};
      const bool fresh = p == 0 || s.sorted[p].first != s.sorted[p - 1].first;
      for (int64_t panel = 0; panel * kW < columns; ++panel, one += panel_size, other += panel_size) {
        const int64_t base_row = (panel * sweep.window + t) * kW, here = columns - panel * kW;
        const T* start = sweep.base.data + base_row;
        T* with_one = begun + panel * kW;
        Vec<T> x[kVectors];
        if (fresh)
          for (int j = 0; j < kVectors; ++j) store(with_one + j * kL, load(start + j * kL) + load(one + j * kL));
        for (int j = 0; j < kVectors; ++j) x[j] = load(with_one + j * kL) + load(other + j * kL);
        if (!kPlain && s.cap > 0)
          for (int j = 0; j < kVectors; ++j) x[j] = capped<T>(x[j], s.cap);
        if (!kPlain && s.clean_lse != nullptr) {
          Vec<T> moved[kVectors];
          for (int j = 0; j < kVectors; ++j)
            moved[j] =
                s.cap > 0 ? x[j] - capped<T>(load(start + j * kL), s.cap) : load(one + j * kL) + load(other + j * kL);
          change += expected<T>(clean.data + base_row, moved);
        }
        if (!kPlain && here < kW) end_at<T>(here, x, scratch);
        add_exponentials<T>(row.sum, lanes, x, scratch, here < kW ? here : kW);
      }
      join<T>(row.sum, lanes);
      if (!kPlain && s.clean_lse != nullptr) row.change += sum<T>(change);
    }
  }

  static JointTask kernels() {
    return [](const JointArguments& s, const Block& block) { Joint(s, block).run(); };
  }

  void run() {
    sweep.run(*this);
    for (int64_t t = 0; t < sweep.window; ++t)
      for (int64_t p = 0; p < s.pairs; ++p) {
        const JointRow<T>& row = rows.data[t * s.pairs + p];
        const int64_t out = s.sorted[p].place * s.inputs.positions + sweep.block.first_position + t;
        s.lse[out] = logarithm<T>(row.sum);
        if (s.change != nullptr) s.change[out] = row.change;
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

// All singles are in every task; packed, with their products with a stripe, they fill the L2 cache. Shorter tasks would
// pack every basis more often, which costs more than what spills into the L3 cache.
TilePlan plan_joint(int64_t singles, int64_t positions, int64_t row_bytes, int64_t threads) {
  if (positions == 0) return {1, 1, 0};
  const int64_t longest = std::clamp<int64_t>(caches().l2 / std::max<int64_t>(row_bytes * singles, 1), 1, 64);
  TilePlan plan{std::max<int64_t>(singles, 1), even_block(positions, longest), 0};
  while (ceil_div(positions, plan.position_block) < 2 * threads && plan.position_block > 8)
    plan.position_block = ceil_div(plan.position_block, 2);
  plan.tasks = ceil_div(positions, plan.position_block);
  return plan;
}

std::tuple<Tensor, Tensor, Tensor> joint_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                             const Tensor& tokens, const Tensor& group, const Tensor& pairs,
                                             const std::optional<Tensor>& clean_lse, const std::string& precision,
                                             std::optional<double> cap) {
  Sizes sizes = check_nll(base, delta, basis, tokens, group, clean_lse, cap);
  sizes("pairs", pairs, "N 2", Kind::index);
  FC_CHECK(sizes["P"] > 0 || sizes["N"] == 0, "pairs has shape ", shape_of(pairs), ", but delta ", shape_of(delta),
           " holds no ablation");
  const int64_t S = sizes["P"], P = sizes["N"], r = sizes["r"];
  const JointTask task = pick(pick_joint_nll, "base", base, precision);

  const NllTensors tensors(inputs_of(base, delta, basis, group), base, P, tokens, clean_lse);
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
