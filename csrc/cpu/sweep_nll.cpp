// sweep_nll on the CPU: what each (ablation, position) does to the logsumexp of the logits and to the logits of some
// tokens. The epilogue weighs each tile's changes with the clean run's probabilities, so that logits never exist.
#include "effects.h"

namespace fc::cpu {

struct SweepArguments : EffectArguments {
  const double* scale;  // [P,T] or null
};

using SweepTask = void (*)(const SweepArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

template <class T>
struct SweepRow {  // one (ablation, position)
  T length, scale, less_1;
  int64_t position;
  int64_t out;  // index into [P,T]; negative for the rows that fill a block
};

template <class Scheme, class Source>
struct SweepNll : Effects<Scheme, Source> {
  using Base = Effects<Scheme, Source>;
  using Base::kL, Base::kW, Base::sweep;
  using T = typename Scheme::Accumulator;

  const SweepArguments& s;
  Buffer<SweepRow<T>> rows{sweep.blocks * kRows};
  Buffer<EffectSums> sums{sweep.blocks * kRows};
  Buffer<Vec<T>> small{sweep.blocks * kRows};  // lanes
  Buffer<EffectLanes<T>> lanes{sweep.blocks * kRows};
  int64_t first = 0;  // token of the stripe
  int64_t stripes = 0;

  SweepNll(const SweepArguments& s, const Block& block) : Base(s, block, s.scale != nullptr), s(s) {
    for (int64_t i = 0; i < sums.count; ++i)
      sums.data[i] = {}, small.data[i] = Vec<T>{}, lanes.data[i] = EffectLanes<T>{};
  }

  void row(int64_t i, int64_t p, int64_t t, T length) {
    const int64_t out = p < 0 ? -1 : p * s.inputs.positions + t;
    const Stretch stretch = this->stretch(out);
    rows.data[i] = {length, static_cast<T>(stretch.scale), static_cast<T>(stretch.less_1),
                    t - sweep.block.first_position, out};
  }

  Stretch stretch(int64_t out) const {
    return out < 0 || s.scale == nullptr ? Stretch{} : Stretch{s.scale[out], s.scale[out] - 1};
  }

  bool plain(int64_t) const { return s.scale == nullptr && s.cap == 0; }

  void stripe_packed(int64_t first_token, int64_t columns) {
    first = first_token;
    Base::stripe_packed(first_token, columns);
  }

  template <bool kPlain>
  [[gnu::always_inline]] void consume(const SweepTile<T>& tile, int i) {
    const int64_t index = tile.block * kRows + i;
    const SweepRow<T>& row = rows.data[index];
    T reach = row.length * tile.longest;
    if (!kPlain)
      reach = reach * row.scale +
              this->farthest.data[tile.panel / kTogether * sweep.window + row.position] * std::fabs(row.less_1);
    const RowOfTile<kPlain> seen{*this, tile, row, index};
    const auto into = [&](auto mean) __attribute__((always_inline)) {
      this->template add<decltype(mean)::value>(sums.data[index], small.data[index], lanes.data[index], reach,
                                                row.position, tile.panel, tile.panels, seen);
    };
    if (!s.with_mean)
      into(std::false_type{});
    else
      into(std::true_type{});
  }

  // A row of a tile, as Effects::add sees it.
  template <bool kPlain>
  struct RowOfTile {
    SweepNll& op;
    const SweepTile<T>& tile;
    const SweepRow<T>& row;
    const int64_t index;

    [[gnu::always_inline]] void changes(Vec<T> (&x)[kVectors], int64_t panel) const {
      const T* products = tile.products + panel * tile.stride + index % kRows * kW;
      for (int j = 0; j < kVectors; ++j) x[j] = load(products + j * kL);
      if (!kPlain) op.change(x, row.scale, row.less_1, (tile.panel + panel) * op.sweep.window + row.position);
    }
    void full(int64_t panel) const { op.full(tile, row, index, panel); }
  };

  [[gnu::noinline]] void full(const SweepTile<T>& tile, const SweepRow<T>& row, int64_t index, int64_t panel) {
    if (row.out < 0) return;
    double products[kW];
    multiply_row<Scheme>(products, left_row(index), panel_at(tile.panel + panel), sweep.depth);
    const int64_t clean_row = (tile.panel + panel) * sweep.window + row.position;
    this->add_full(sums.data[index], products, stretch(row.out), row.position, tile.first + panel * kW,
                   tile.columns_of(panel, kW), this->probable.data[clean_row]);
  }

  void make_rows_anew() {
    sweep.pack_deltas(*this);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t out = rows.data[i].out;
      if (out < 0 || !s.anew[out]) continue;
      look_for_interrupt();
      make_anew(i);
      s.totals[out] = Base::totals_of(sums.data[i]);
    }
  }

  void make_anew(int64_t index) {
    const SweepInputs& inputs = s.inputs;
    const int64_t out = rows.data[index].out, p = out / inputs.positions, t = out % inputs.positions;
    const Source* z = inputs.delta.template at<Source>(p) + t * inputs.delta.stride[1];
    const auto entry = [&](int64_t k) { return static_cast<double>(widen(z[k * inputs.delta.stride[2]])); };
    const bool made = inputs.outer.data != nullptr;
    Buffer<double> wide{made ? inputs.depth : 0};
    for (int64_t i = 0; i < wide.count; ++i) {
      wide.data[i] = 0;
      const Source* outer = inputs.outer.template at<Source>(inputs.group[p]) + i * inputs.outer.stride[2];
      for (int64_t k = 0; k < inputs.rank; ++k) wide.data[i] += entry(k) * widen(outer[k * inputs.outer.stride[1]]);
    }
    const Source* basis = inputs.basis.template at<Source>(made ? 0 : inputs.group[p]);
    Base::make_anew(sums.data[index], stretch(out), rows.data[index].position, 0, inputs.vocabulary,
                    [&](double (&products)[kW], int64_t first_token, int64_t here) {
                      const Source* columns = basis + first_token * inputs.basis.stride[2];
                      const auto factor = [&](int64_t k) { return made ? wide.data[k] : entry(k); };
                      Base::multiply_given(products, factor, made ? inputs.depth : inputs.rank, columns,
                                           inputs.basis.stride + 1, here);
                    });
  }

  const typename Scheme::Left* left_row(int64_t index) const {
    return sweep.left.data + index / kRows * kRows * sweep.depth + index % kRows;
  }
  const typename Scheme::Right* panel_at(int64_t panel) const { return sweep.panels.data + panel * kW * sweep.depth; }

  void group_done(const SweepGroup<Scheme>& group) {
    this->for_cells(group, [&](const Cell& cell, int64_t index, double product) {
      const int64_t out = rows.data[index].out;
      this->settle(sums.data[index], cell, out, first, product, stretch(out));
    });
  }

  void stripe_done(int64_t, int64_t) {
    this->cell_count = 0;
    ++stripes;
    if (stripes % kStripesAFlush == 0) flush();
  }

  void flush() {
    for (int64_t i = 0; i < sums.count; ++i) Base::flush(sums.data[i], small.data[i], lanes.data[i]);
  }

  void part_done() {
    flush();
    for (int64_t i = 0; i < sums.count; ++i) {
      if (rows.data[i].out < 0) continue;
      add_part(s.totals[sweep.block.part * s.inputs.pairs * s.inputs.positions + rows.data[i].out],
               Base::totals_of(sums.data[i]));
      sums.data[i] = {};
    }
  }

  static SweepTask kernels() {
    return [](const SweepArguments& s, const Block& block) {
      SweepNll op(s, block);
      if (s.anew == nullptr)
        op.run();
      else
        op.make_rows_anew();
    };
  }

  void run() { sweep.run(*this); }
};

}  // namespace

SweepTask sweep_nll(Arithmetic arithmetic) { return select<SweepNll>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(SweepTask, sweep_nll, Arithmetic)

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sweep_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                                     const Tensor& tokens, const Tensor& group,
                                                     const std::optional<Tensor>& scale, const Tensor& clean_lse,
                                                     bool mean, const std::string& precision, std::optional<double> cap,
                                                     const std::optional<Tensor>& outer) {
  Sizes sizes = check_effects(base, delta, basis, tokens, group, clean_lse, cap, outer);
  sizes("scale", scale, "P T", Kind::number);
  const int64_t P = sizes["P"], T = sizes["T"], depth_bytes = sizes["r"] * static_cast<int64_t>(base.element_size());
  const SweepTask task = pick(pick_sweep_nll, "base", base, precision);

  const int64_t threads = torch::stable::get_num_threads();
  // Work of few rows is shared out by parts of the vocabulary too: a basis is then packed once.
  const int64_t stripe_bytes = kPanelsAStripe * panel_bytes(current_tier());
  const int64_t stripe = stripe_bytes / (base.scalar_type() == ScalarType::Double ? 8 : 4);
  const int64_t most = parts_of(ceil_div(sizes["V"], stripe));
  const TilePlan plan = outer.has_value() ? plan_pairs(P, T, depth_bytes, threads, caches().l2)
                                          : plan_tiles(P, T, depth_bytes, threads, caches().l2, most);
  const int64_t parts = !outer.has_value() && plan.tasks < 2 * threads ? most : 1;
  EffectTensors tensors(inputs_of(base, delta, basis, group, outer), base, P, tokens, clean_lse, mean, parts);
  const std::optional<Tensor> scale_c = contiguous_as(scale, ScalarType::Double);
  SweepArguments arguments{tensors.arguments(cap), data_of<const double>(scale_c)};
  run_blocks(arguments, task, plan, parts);
  const std::vector<uint8_t> anew = tensors.join_parts();
  if (!anew.empty()) {
    arguments.anew = anew.data();
    run_blocks(arguments, task, plan);
  }
  return tensors.results();
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("sweep_nll", TORCH_BOX(&fc::cpu::sweep_nll)); }

#endif
