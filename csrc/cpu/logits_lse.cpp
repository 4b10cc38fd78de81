// logits_lse on the CPU: the logsumexp of base + delta @ basis of every (ablation, position). The epilogue sums the
// exponentials of each tile's logits, so that logits never reach memory. Where r is 0, as for the clean run, nothing is
// multiplied or packed: rows of base are summed as they lie.
#include "sweep.h"

namespace fc::cpu {

struct LseArguments {
  SweepInputs inputs;
  double cap;   // logits x become cap * tanh(x / cap); 0: they do not
  double* lse;  // [P,T]
};

using LseTask = void (*)(const LseArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

#include "exp_sums.h"

namespace fc::cpu::FC_TIER {
namespace {

template <class T>
struct LseRow {  // one (ablation, position)
  ExpSum<T> sum;
  int64_t out;  // index into [P,T]; negative for the rows that fill a block
  int64_t position;
};

template <class Scheme, class Source>
struct LogitsLse : Epilogue {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;

  const LseArguments& s;
  Sweep<Scheme, Source> sweep;
  Buffer<LseRow<T>> rows{sweep.blocks * kRows};
  Buffer<Vec<T>> lanes{sweep.blocks * kRows};
  int64_t stripes = 0;

  LogitsLse(const LseArguments& s, const Block& block) : s(s), sweep{s.inputs, block} {
    std::memset(static_cast<void*>(lanes.data), 0, lanes.bytes());
  }

  void row(int64_t i, int64_t p, int64_t t, T) {
    rows.data[i] = {{}, p < 0 ? -1 : p * s.inputs.positions + t, t - sweep.block.first_position};
  }

  bool plain(int64_t columns) const { return s.cap == 0 && columns % kW == 0; }

  template <bool kPlain>
  [[gnu::always_inline]] void consume(const SweepTile<T>& tile, int i) {
    const int64_t index = tile.block * kRows + i;
    LseRow<T>& row = rows.data[index];
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      T* products = tile.products + panel * tile.stride + i * kW;
      const T* start = sweep.base.data + ((tile.panel + panel) * sweep.window + row.position) * kW;
      const int64_t here = tile.columns_of(panel, kW);
      Vec<T> x[kVectors];
      for (int j = 0; j < kVectors; ++j) x[j] = load(start + j * kL) + load(products + j * kL);
      if (!kPlain && s.cap > 0)
        for (Vec<T>& logits : x) logits = capped<T>(logits, s.cap);
      if (!kPlain && here < kW) end_at<T>(here, x, products);
      add_exponentials<T>(row.sum, lanes.data[index], x, products, here);
    }
  }

  void stripe_done(int64_t, int64_t) {
    if (++stripes % kStripesAFlush == 0) flush();
  }

  void flush() {
    for (int64_t i = 0; i < rows.count; ++i) {
      join<T>(rows.data[i].sum, lanes.data[i]);
      lanes.data[i] = Vec<T>{};
    }
  }

  static LseTask kernels() {
    return [](const LseArguments& s, const Block& block) {
      if (s.inputs.rank == 0)
        sum_base(s, block);
      else
        LogitsLse(s, block).run();
    };
  }

  static void sum_base(const LseArguments& s, const Block& block) {
    constexpr int64_t part = kStripesAFlush * kPanelsAStripe * kW;
    for (int64_t t = block.first_position; t < block.end_position; ++t) {
      look_for_interrupt();
      ExpSum<T> sum;
      for (int64_t first = 0; first < s.inputs.vocabulary; first += part) {
        Vec<T> lanes{};
        for (int64_t at = first; at < smaller(first + part, s.inputs.vocabulary); at += kW)
          add_base(s, t, at, smaller(kW, s.inputs.vocabulary - at), sum, lanes);
        join<T>(sum, lanes);
      }
      for (int64_t p = block.first_pair; p < block.end_pair; ++p) s.lse[p * s.inputs.positions + t] = logarithm<T>(sum);
    }
  }

  static void add_base(const LseArguments& s, int64_t t, int64_t first, int64_t here, ExpSum<T>& sum, Vec<T>& lanes) {
    const auto [row_stride, column_stride] = s.inputs.base.stride;
    const Source* logits = static_cast<const Source*>(s.inputs.base.data) + t * row_stride + first * column_stride;
    alignas(64) T panel[kW];
    with_stride(column_stride, [&](auto stride) {
      if (here == kW)
        for (int64_t j = 0; j < kW; ++j) panel[j] = widen(logits[j * stride]);
      else
        for (int64_t j = 0; j < here; ++j) panel[j] = widen(logits[j * stride]);
    });
    Vec<T> x[kVectors];
    for (int j = 0; j < kVectors; ++j) x[j] = load(panel + j * kL);
    if (s.cap > 0)
      for (Vec<T>& logit : x) logit = capped<T>(logit, s.cap);
    if (here < kW) end_at<T>(here, x, panel);
    add_exponentials<T>(sum, lanes, x, panel, here);
  }

  void run() {
    sweep.run(*this);
    flush();
    for (int64_t i = 0; i < rows.count; ++i)
      if (rows.data[i].out >= 0) s.lse[rows.data[i].out] = logarithm<T>(rows.data[i].sum);
  }
};

}  // namespace

LseTask logits_lse(Arithmetic arithmetic) { return select<LogitsLse>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(LseTask, logits_lse, Arithmetic)

namespace {

Tensor logits_lse(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& group,
                  const std::string& precision, std::optional<double> cap) {
  if (cap.has_value()) check_positive("cap", *cap);
  Sizes sizes = check_sweep(base, delta, basis, group);
  const int64_t P = sizes["P"], T = sizes["T"], depth_bytes = sizes["r"] * static_cast<int64_t>(base.element_size());
  const LseTask task = pick(pick_logits_lse, "base", base, precision);
  Tensor lse = torch::stable::new_empty(base, {P, T}, ScalarType::Double);
  const OwnedInputs inputs = inputs_of(base, delta, basis, group);
  const LseArguments arguments{inputs.view, cap.value_or(0), data_of<double>(lse)};
  const int64_t threads = torch::stable::get_num_threads();
  run_blocks(arguments, task,
             depth_bytes == 0 ? plan_rows(P, T, threads) : plan_tiles(P, T, depth_bytes, threads, caches().l2));
  return lse;
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("logits_lse", TORCH_BOX(&fc::cpu::logits_lse)); }

#endif
