// sweep_nll on the CPU: the logsumexp of the ablated logits of every (ablation, position), the logits of some tokens,
// and how far the ablation moves the logits under the clean run's probabilities. The epilogue sums the exponentials of
// each tile's logits, so that logits never reach memory.
#include "nll.h"

namespace fc::cpu {

struct SweepArguments : NllArguments {
  const double* scale;  // [P,T] or null
};

using SweepTask = void (*)(const SweepArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

// Stripes whose exponentials a row's lanes sum before they join its fp64 total: 16 stripes of 4 panels of 3 vectors are
// 192 addends a lane, whose rounding stays below that of the logits.
constexpr int64_t kStripesAFlush = 16;

template <class T>
struct Row {  // one (ablation, position)
  ExpSum<T> sum;
  T scale;
  int64_t out;  // index into [P,T]; negative for the rows that fill a block
  int64_t position;
  double change;
};

template <class Scheme, class Source>
struct Nll : NllEpilogue<Scheme, Source> {
  using Base = NllEpilogue<Scheme, Source>;
  using Base::clean, Base::kL, Base::kW, Base::sweep;
  using T = typename Scheme::Accumulator;

  const SweepArguments& s;
  Buffer<Row<T>> rows{sweep.blocks * kRows};
  Buffer<Vec<T>> lanes{sweep.blocks * kRows};
  Buffer<Vec<T>> change_lanes{s.clean_lse ? sweep.blocks * kRows : 0};
  int64_t stripes = 0;

  Nll(const SweepArguments& s, const Block& block) : Base(s, block), s(s) {
    std::memset(static_cast<void*>(lanes.data), 0, lanes.bytes());
    std::memset(static_cast<void*>(change_lanes.data), 0, change_lanes.bytes());
  }

  void row(int64_t i, int64_t p, int64_t t) {
    const int64_t out = p < 0 ? -1 : p * s.inputs.positions + t;
    rows.data[i] = {{}, out >= 0 && s.scale ? static_cast<T>(s.scale[out]) : T(1), out, t, 0.0};
  }

  bool plain(int64_t columns) const {
    return s.scale == nullptr && s.clean_lse == nullptr && s.cap == 0 && columns % kW == 0;
  }

  // Makes a row of a tile into logits by adding the clean ones, and adds their exponentials to the row's sum. The
  // logits take the products' place in memory only where something else has to read them.
  template <bool kPlain>
  [[gnu::always_inline]] void consume(const SweepTile<T>& tile, int i) {
    const int64_t index = tile.block * kRows + i, here = tile.columns;
    Row<T>& row = rows.data[index];
    T* products = tile.products + i * kW;
    const int64_t base_row = (tile.panel_row + row.position) * kW;
    const T* start = sweep.base.data + base_row;
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
        x[j] = capped<T>(x[j], s.cap);
        if (s.clean_lse != nullptr) moved[j] = x[j] - capped<T>(load(start + j * kL), s.cap);
      }
    if (!kPlain && here < kW) end_at<T>(here, x, products);
    add_exponentials<T>(row.sum, lanes.data[index], x, products, here);
    if (!kPlain && s.clean_lse != nullptr) change_lanes.data[index] += expected<T>(clean.data + base_row, moved);
    const int64_t* tokens = s.tokens + row.position * s.tokens_per_position;
    for (int64_t c = 0; c < s.tokens_per_position; ++c) {
      const auto offset = static_cast<uint64_t>(tokens[c] - tile.first);
      if (offset >= static_cast<uint64_t>(here) || row.out < 0) continue;
      for (int j = 0; j < kVectors; ++j) store(products + j * kL, x[j]);
      s.picked[row.out * s.tokens_per_position + c] = products[offset];
    }
  }

  void stripe_done(int64_t, int64_t) {
    if (++stripes % kStripesAFlush == 0) flush();
  }

  void flush() {
    for (int64_t i = 0; i < sweep.blocks * kRows; ++i) {
      join<T>(rows.data[i].sum, lanes.data[i]);
      lanes.data[i] = Vec<T>{};
      if (s.clean_lse == nullptr) continue;
      rows.data[i].change += sum<T>(change_lanes.data[i]);
      change_lanes.data[i] = Vec<T>{};
    }
  }

  static SweepTask kernels() {
    return [](const SweepArguments& s, const Block& block) { Nll(s, block).run(); };
  }

  void run() {
    sweep.run(*this);
    flush();
    for (int64_t i = 0; i < sweep.blocks * kRows; ++i) {
      const Row<T>& row = rows.data[i];
      if (row.out < 0) continue;
      s.lse[row.out] = logarithm<T>(row.sum);
      if (s.change != nullptr) s.change[row.out] = row.change;
    }
  }
};

}  // namespace

SweepTask sweep_nll(Arithmetic arithmetic) { return select<Nll>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(SweepTask, sweep_nll, Arithmetic)

namespace {

std::tuple<Tensor, Tensor, Tensor> sweep_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                             const Tensor& tokens, const Tensor& group,
                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& clean_lse,
                                             const std::string& precision, std::optional<double> cap,
                                             const std::optional<Tensor>& outer) {
  Sizes sizes = check_nll(base, delta, basis, tokens, group, clean_lse, cap, outer);
  sizes("scale", scale, "P T", Kind::number);
  const int64_t P = sizes["P"], T = sizes["T"], depth_bytes = sizes["r"] * static_cast<int64_t>(base.element_size());
  const SweepTask task = pick(pick_sweep_nll, "base", base, precision);

  const NllTensors tensors(inputs_of(base, delta, basis, group, outer), base, P, tokens, clean_lse);
  const std::optional<Tensor> scale_c = contiguous_as(scale, ScalarType::Double);
  const SweepArguments arguments{tensors.arguments(cap), data_of<const double>(scale_c)};
  const auto plan = outer.has_value() ? plan_pairs : plan_tiles;
  run_blocks(arguments, task, plan(P, T, depth_bytes, torch::stable::get_num_threads(), caches().l2));
  return tensors.results();
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("sweep_nll", TORCH_BOX(&fc::cpu::sweep_nll)); }

#endif
