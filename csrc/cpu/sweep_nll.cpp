// sweep_nll on the CPU: the epilogue sums exponentials of each tile's logits, so that logits never reach memory.
#include <cstdint>

#include "dispatch.h"
#include "sweep.h"

namespace fc::cpu {

struct SweepArguments {
  Changes changes;
  const int64_t* tokens;          // [T,K]; outside [0, V): absent from this vocabulary slice
  const double* scale;            // [P,T] or null
  const double* clean_lse;        // [T] or null
  double cap;                     // logits x become cap * tanh(x / cap); 0: they do not
  double *lse, *picked, *change;  // [P,T], [P,T,K], [P,T] or null
  int64_t choices;
};

using SweepTask = void (*)(const SweepArguments&, const Block&);

}  // namespace fc::cpu

#ifdef FC_TIER

#include "exp_sums.h"

namespace fc::cpu::FC_TIER {
namespace {

constexpr int64_t kStripesAFlush = 16;  // lanes hold at most 192 addends before they join the fp64 total

template <class T>
struct Row {  // one (ablation, position)
  ExpSum<T> sum;
  T scale;
  int64_t out;  // index into [P,T]; negative for the rows that fill a block
  int64_t position;
  double change;
};

template <class Scheme, class Source>
struct Nll : Epilogue {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;

  const SweepArguments& s;
  Sweep<Scheme, Source> sweep;
  Buffer<T> clean{s.clean_lse ? kPanelsAStripe * kW * sweep.window : 0};  // probabilities of the clean run
  Buffer<Row<T>> rows{sweep.blocks * kRows};
  Buffer<Vec<T>> lanes{sweep.blocks * kRows};
  Buffer<Vec<T>> change_lanes{s.clean_lse ? sweep.blocks * kRows : 0};
  int64_t stripes = 0;

  Nll(const SweepArguments& s, const Block& block) : s(s), sweep{s.changes, block} {
    std::memset(static_cast<void*>(lanes.data), 0, lanes.bytes());
    std::memset(static_cast<void*>(change_lanes.data), 0, change_lanes.bytes());
  }

  void row(int64_t i, int64_t p, int64_t t) {
    const int64_t out = p < 0 ? -1 : p * s.changes.positions + t;
    rows.data[i] = {{}, out >= 0 && s.scale ? static_cast<T>(s.scale[out]) : T(1), out, t, 0.0};
    for (int64_t c = 0; c < s.choices && out >= 0; ++c) s.picked[out * s.choices + c] = 0;
  }

  void base_packed(int64_t row, int64_t here) {
    if (s.clean_lse == nullptr) return;
    const double lse = s.clean_lse[sweep.block.first_position + row % sweep.window];
    probabilities<T>(clean.data + row * kW, sweep.base.data + row * kW, here, lse, s.cap);
  }

  bool plain(int64_t columns) const {
    return s.scale == nullptr && s.clean_lse == nullptr && s.cap == 0 && columns % kW == 0;
  }

  // Adds the clean logits, then the exponentials to the row's sum. The products become logits in place where something
  // else has to read them.
  template <bool kPlain>
  [[gnu::always_inline]] void consume(const SweepTile<T>& tile, int i) {
    const int64_t index = tile.block * kRows + i, here = tile.here;
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
    const int64_t* tokens = s.tokens + row.position * s.choices;
    for (int64_t c = 0; c < s.choices; ++c) {
      const auto offset = static_cast<uint64_t>(tokens[c] - tile.first);
      if (offset >= static_cast<uint64_t>(here) || row.out < 0) continue;
      for (int j = 0; j < kVectors; ++j) store(products + j * kL, x[j]);
      s.picked[row.out * s.choices + c] = products[offset];
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

template <class Scheme, class Source>
void run(const SweepArguments& s, const Block& block) {
  Nll<Scheme, Source>(s, block).run();
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

#include <optional>
#include <tuple>

namespace fc::cpu {

FC_TIERS(SweepTask, sweep_nll, Kind)

namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor> sweep_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                             const Tensor& tokens, const Tensor& group,
                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& clean_lse,
                                             const std::string& precision, std::optional<double> cap,
                                             const std::optional<Tensor>& outer) {
  const auto [P, T, V, r, G, K] = check_sweep(base, delta, basis, tokens, group, scale, clean_lse, cap, outer);
  const SweepTask task = pick_sweep_nll(kind_of("base", base.scalar_type(), precision));
  check_instructions(task != nullptr, "precision");

  const auto fp64 = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(base, size, ScalarType::Double);
  };
  Tensor lse = fp64({P, T}), picked = fp64({P, T, K}), change = fp64({clean_lse.has_value() ? P : 0, T});
  const Tensor tokens_c = torch::stable::contiguous(tokens);
  std::optional<Tensor> scale_c, clean_c;
  if (scale.has_value()) scale_c = contiguous_as(*scale, ScalarType::Double);
  if (clean_lse.has_value()) clean_c = contiguous_as(*clean_lse, ScalarType::Double);
  const OwnedChanges changes = changes_of(base, delta, basis, group, outer);
  const SweepArguments arguments{
      .changes = changes.view,
      .tokens = static_cast<const int64_t*>(tokens_c.data_ptr()),
      .scale = scale_c.has_value() ? static_cast<const double*>(scale_c->data_ptr()) : nullptr,
      .clean_lse = clean_c.has_value() ? static_cast<const double*>(clean_c->data_ptr()) : nullptr,
      .cap = cap.value_or(0),
      .lse = static_cast<double*>(lse.data_ptr()),
      .picked = static_cast<double*>(picked.data_ptr()),
      .change = clean_c.has_value() ? static_cast<double*>(change.data_ptr()) : nullptr,
      .choices = K};
  const int64_t depth_bytes = r * static_cast<int64_t>(base.element_size());
  const int64_t threads = torch::stable::get_num_threads();
  run_blocks(arguments.changes,
             outer.has_value() ? plan_pairs(P, T, depth_bytes, threads) : plan_tiles(P, T, depth_bytes, threads),
             [&](const Block& block) { task(arguments, block); });
  return {lse, picked, change};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("sweep_nll", TORCH_BOX(&fc::cpu::sweep_nll)); }

#endif
