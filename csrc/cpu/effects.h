// What sweep_nll and joint_nll share: how ablations change the distribution of the next token.
//
// With p the clean run's probabilities and d what an ablation adds to the logits, both sum p * (exp(d) - 1), and also
// p * exp(d), which is the better where nearly all probability goes away. A bound on |d|, known before multiplying,
// chooses the form of each row of a panel: small (exp(d) - 1 is a polynomial), direct (d is split first) or full (all
// of it in fp64). In every form the tokens asked for, and the most probable ones of a position, are computed in fp64:
// there the rounding of one product could be as large as the effect.
#pragma once

#include <cmath>
#include <limits>

#include "sweep.h"

namespace fc::cpu {

// log(exp(a) + exp(b)); NaN where either is.
static inline double added(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  if (!(low > -std::numeric_limits<double>::infinity())) return low == low ? high : low;
  return high + std::log1p(std::exp(low - high));
}

struct EffectTotals {  // of one (ablation, position) over parts of the vocabulary; EffectSums says of what
  double gain = 0, total = 0, log_exact = -std::numeric_limits<double>::infinity(), mean = 0, near = 0, raised = 0;

  double log_total() const { return added(std::log(total), log_exact); }
};

struct EffectArguments {
  SweepInputs inputs;
  const int64_t* tokens;        // [T,K]; outside [0, V): absent from this slice of the vocabulary
  const double* clean_lse;      // [T]
  double cap;                   // logits x become cap * tanh(x / cap); 0: they do not
  bool with_mean;               // whether that is asked for
  EffectTotals* totals;         // [parts,P,T]
  const uint8_t* anew;          // [P,T]: the rows that are made anew in fp64, and no others; or null
  double* picked;               // [P,T,K] of zeros
  int64_t tokens_per_position;  // K
};

// Where an ablation raises tokens of little probability, the changed distribution expects far larger changes than the
// clean one does, and their rounding counts for more. From so many times as large on, a row is made anew in fp64. Both
// are expectations over the slice of the vocabulary at hand, whatever its share of all probability.
inline constexpr double kRaised = 16;
static inline bool is_raised(const EffectTotals& totals) {
  if (!(totals.raised > 0)) return false;  // no large change: nearly always
  const double total = std::exp(totals.log_total());
  const double mass = std::fmax(total - totals.gain, 1e-5 * total);  // below that the difference has no digits
  return totals.raised * mass > kRaised * totals.near * total;
}

static inline void add_part(EffectTotals& totals, const EffectTotals& part) {
  totals.gain += part.gain;
  totals.total += part.total;
  totals.log_exact = added(totals.log_exact, part.log_exact);
  totals.mean += part.mean;
  totals.near += part.near;
  totals.raised += part.raised;
}

}  // namespace fc::cpu

#ifdef FC_TIER

#include "exp_sums.h"

namespace fc::cpu::FC_TIER {

inline constexpr double kProbable = 1.0 / 16;  // from where on a token is computed in fp64
inline constexpr int64_t kMostProbable = 16;   // how many such tokens a position has at most

inline constexpr double kFurthest = 80;    // how far a change may be in the direct form
inline constexpr double kLowestLog = -86;  // the least logarithm of a probability that fp32 holds to all digits

struct EffectSums {      // of one (ablation, position)
  double gain = 0;       // p * (exp(d) - 1)
  double mean = 0;       // p * d
  double total = 0;      // p * exp(d) of the small and direct forms
  double near = 0;       // p * |d| of the direct form, and of what is computed in fp64
  double raised = 0;     // p * exp(d) * |d| of the direct form
  ExpSum<double> exact;  // p * exp(d) of all that is computed in fp64
};

template <class T>
struct EffectLanes {  // what has not joined the sums of the same names, but for `direct`, which joins gain
  Vec<T> direct, total, mean, near, raised;
  bool used = false;
};

struct Stretch {  // what a recomputed final norm multiplies the logits by, and that less 1
  double scale = 1, less_1 = 0;
};

struct Cell {                       // a token of a position that is computed in fp64
  int64_t position, panel, column;  // of the block, the stripe, the panel
  int64_t choice = -1;              // of the tokens asked for; -1: it joins the sums
};

// The clean run of a block's positions, a stripe at a time, and the sums of p * (exp(d) - 1) over rows of its panels.
template <class Scheme, class Source>
struct Effects : Epilogue {
  static constexpr bool kBounds = true;
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;
  static_assert(kW <= 64);  // a bit for each column

  const EffectArguments& s;
  const bool stretched;
  Sweep<Scheme, Source> sweep;
  const int64_t clean_rows = kPanelsAStripe * sweep.window;  // [panel][position]
  // What a stretch multiplies (log probabilities, or the logits that have a cap), and the largest of a tile's row.
  Buffer<T> start{stretched ? clean_rows * kW : 0}, farthest{clean_rows / kTogether};
  Buffer<T> saturation{s.cap > 0 ? clean_rows * kW : 0};  // tanh(x / cap) of the logits x
  Buffer<T> slope{s.cap > 0 ? clean_rows * kW : 0};       // 1 - tanh(x / cap)^2
  Buffer<double> mass{clean_rows / kTogether};            // sums of p by tile, less the most probable tokens
  Buffer<uint64_t> probable{clean_rows};                  // a bit for each of those
  Buffer<Cell> cells{sweep.window * (kMostProbable + s.tokens_per_position)};  // of the stripe
  int64_t cell_count = 0;
  // Past these bounds, by tile, products are made in fp64: fp32's range would end, or a cap bends too much.
  Buffer<T> furthest{clean_rows / kTogether};

  Effects(const EffectArguments& s, const Block& block, bool stretched)
      : s(s), stretched(stretched), sweep{s.inputs, block} {}

  // Keeps what changes of a row's logits depend on, and puts probabilities in their place.
  void base_packed(int64_t row, int64_t here) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T* const x = sweep.base.data + row * kW;
    const int64_t t = row % sweep.window, panel = row / sweep.window;
    const double lse = s.clean_lse[sweep.block.first_position + t];
    const T high = static_cast<T>(lse), low = static_cast<T>(lse - static_cast<double>(high));
    const int64_t of_tile = panel / kTogether * sweep.window + t;
    if (panel % kTogether == 0) {
      farthest.data[of_tile] = 0, mass.data[of_tile] = 0;
      furthest.data[of_tile] = static_cast<T>(s.cap > 0 ? std::fmin(kFurthest, s.cap / 2) : kFurthest);
    }
    for (int64_t j = 0; stretched && j < kW; ++j) {
      const T from = j >= here || x[j] == -infinity ? T(0) : s.cap > 0 ? x[j] : x[j] - high - low;
      start.data[row * kW + j] = from;
      if (!(std::fabs(from) <= farthest.data[of_tile])) farthest.data[of_tile] = std::fabs(from);
    }
    Vec<T> logit[kVectors], p[kVectors];
    for (int j = 0; j < kVectors; ++j) logit[j] = load(x + j * kL);
    if (s.cap > 0) bend(logit, row);
    uint64_t deep = 0;
    for (int j = 0; j < kVectors; ++j) {
      deep |= mask_above<false>(high - logit[j], broadcast<T>(T(-kLowestLog))) << j * kL;
      p[j] = exponential<T>(logit[j] - high - low);
    }
    // Probabilities that fp32 cannot hold may still be raised to some that count.
    for (int64_t j = 0; deep != 0 && j < here; ++j)
      if (x[j] != -infinity && (deep >> j & 1) != 0)
        furthest.data[of_tile] = std::fmin(furthest.data[of_tile], T(kFurthest / 2));
    for (int j = 0; j < kVectors; ++j) store(x + j * kL, p[j]);
    probable.data[row] = 0;
    if (here < kW || any_above(p, broadcast<T>(T(kProbable)))) {
      for (int64_t j = here; j < kW; ++j) x[j] = 0;
      for (int64_t j = 0; j < here; ++j) {
        if (!(x[j] > T(kProbable)) || cell_count == sweep.window * kMostProbable) continue;
        probable.data[row] |= uint64_t{1} << j;
        cells.data[cell_count++] = {t, panel, j, -1};
        x[j] = 0;
      }
      for (int j = 0; j < kVectors; ++j) p[j] = load(x + j * kL);
    }
    mass.data[of_tile] += sum<T>((p[0] + p[1]) + p[2]);
  }

  // Caps logits, and keeps what the changes of capped ones depend on.
  void bend(Vec<T> (&logit)[kVectors], int64_t row) {
    for (int j = 0; j < kVectors; ++j) {
      const Vec<T> part = logit[j] / static_cast<T>(s.cap);
      const Vec<T> fall = exponential<T>(T(-2) * magnitude<T>(part));
      store(saturation.data + row * kW + j * kL, hyperbolic_tangent<T>(part));
      store(slope.data + row * kW + j * kL, T(4) * fall / ((fall + T(1)) * (fall + T(1))));
      logit[j] = capped<T>(logit[j], s.cap);
    }
  }

  void stripe_packed(int64_t first, int64_t columns) {
    for (int64_t t = 0; t < sweep.window; ++t) {
      const int64_t* tokens = s.tokens + (sweep.block.first_position + t) * s.tokens_per_position;
      for (int64_t k = 0; k < s.tokens_per_position; ++k) {
        const auto offset = static_cast<uint64_t>(tokens[k] - first);
        if (offset >= static_cast<uint64_t>(columns)) continue;
        const auto at = static_cast<int64_t>(offset);
        cells.data[cell_count++] = {t, at / kW, at % kW, k};
      }
    }
  }

  // f(cell, row, product) for the stripe's cells and the rows of a group at their positions. The products are those of
  // the factors as they were given, rounded for no scheme.
  template <class F>
  void for_cells(const SweepGroup<Scheme>& group, F f) const {
    double products[kRows];
    Buffer<double> given{Scheme::kDepth > 1 ? s.inputs.rank : 0};
    for (int64_t c = 0; c < cell_count; ++c) {
      const Cell& cell = cells.data[c];
      const int64_t first = group.first + cell.position * group.members, end = first + group.members;
      if constexpr (Scheme::kDepth > 1) {
        sweep.read_column(given.data, group.pair, group.token + cell.panel * kW + cell.column);
        for (int64_t row = first; row < end; ++row)
          f(cell, row, sweep.product_given(group.pair + row - first, cell.position, given.data));
        continue;
      }
      for (int64_t block = first / kRows; block * kRows < end; ++block) {
        multiply_column<Scheme>(products, group.left + block * kRows * group.depth,
                                group.panels + cell.panel * kW * group.depth + cell.column, group.depth);
        for (int64_t row = larger(first, block * kRows); row < smaller(end, (block + 1) * kRows); ++row)
          f(cell, row, products[row % kRows]);
      }
    }
  }

  double clean_logit(int64_t t, int64_t token) const {
    const auto* base = static_cast<const Source*>(s.inputs.base.data);
    return widen(base[(sweep.block.first_position + t) * s.inputs.base.stride[0] + token * s.inputs.base.stride[1]]);
  }
  double log_probability(int64_t t, double logit) const {
    return (s.cap > 0 ? s.cap * std::tanh(logit / s.cap) : logit) - s.clean_lse[sweep.block.first_position + t];
  }

  // The change of a clean logit by a product.
  double changed(double product, int64_t t, double logit, const Stretch& stretch) const {
    double d = product;
    if (stretched && !std::isinf(logit))
      d = stretch.scale * d + stretch.less_1 * (s.cap > 0 ? logit : log_probability(t, logit));
    else if (stretched)
      d *= stretch.scale;
    if (s.cap == 0) return d;
    return std::isinf(logit) ? 0 : s.cap * (std::tanh((logit + d) / s.cap) - std::tanh(logit / s.cap));
  }

  // A cell's change joins its row's sums, or the results at `out` of [P,T].
  void settle(EffectSums& sums, const Cell& cell, int64_t out, int64_t first, double product,
              const Stretch& stretch = {}) const {
    const double logit = clean_logit(cell.position, first + cell.panel * kW + cell.column);
    const double d = changed(product, cell.position, logit, stretch);
    if (cell.choice >= 0) {
      s.picked[out * s.tokens_per_position + cell.choice] = d;
      return;
    }
    const double log_p = log_probability(cell.position, logit), p = std::exp(log_p);
    sums.gain += p * std::expm1(d);
    sums.mean += p * d;
    sums.near += p * std::fabs(d);
    add_one(sums.exact, log_p + d);
  }

  // The changes of a row of a panel, from its products.
  [[gnu::always_inline]] void change(Vec<T> (&x)[kVectors], T scale, T less_1, int64_t clean_row) const {
    if (stretched)
      for (int j = 0; j < kVectors; ++j) x[j] = x[j] * scale + load(start.data + clean_row * kW + j * kL) * less_1;
    if (s.cap > 0)
      for (int j = 0; j < kVectors; ++j) {
        const Vec<T> part = hyperbolic_tangent<T>(x[j] / static_cast<T>(s.cap));
        x[j] = static_cast<T>(s.cap) * part * load(slope.data + clean_row * kW + j * kL) /
               (load(saturation.data + clean_row * kW + j * kL) * part + T(1));
      }
  }

  // Adds a row of a tile whose changes are at most `reach`. An Op has
  //   changes(x, panel): the row's changes in a panel of the tile;
  //   full(panel): adds all of a panel in fp64.
  template <bool kMean, class Op>
  [[gnu::always_inline]] void add(EffectSums& sums, Vec<T>& small, EffectLanes<T>& lanes, T reach, int64_t t,
                                  int64_t first_panel, int64_t panels, const Op& op) const {
    const T* p = sweep.base.data + (first_panel * sweep.window + t) * kW;
    const int64_t next = sweep.window * kW;
    Vec<T> x[kVectors], mean{};
    if (reach <= T(kSmall)) [[likely]] {
      Vec<T> more[kVectors] = {};  // apart: no sum waits for another
      for (int64_t panel = 0; panel < panels; ++panel, p += next) {
        op.changes(x, panel);
        for (int j = 0; j < kVectors; ++j) {
          const Vec<T> moved = load(p + j * kL) * x[j];
          more[j] += moved * less_1<T>(x[j]);
          if (kMean) mean += moved;
        }
      }
      small += (more[0] + more[1]) + more[2];
      sums.total += mass.data[first_panel / kTogether * sweep.window + t];
    } else if (reach <= furthest.data[first_panel / kTogether * sweep.window + t]) {
      Vec<T> more{}, steps{}, all{}, near{}, raised{};
      for (int64_t panel = 0; panel < panels; ++panel, p += next) {
        op.changes(x, panel);
        for (int j = 0; j < kVectors; ++j) {
          const auto [power, rest] = split<T>(x[j]);
          const Vec<T> before = load(p + j * kL), doubled = before * power, distance = magnitude<T>(x[j]);
          more += doubled * rest * less_1<T>(rest);
          steps += doubled - before;
          all += doubled;
          near += before * distance;
          raised += doubled * distance;
          if (kMean) mean += before * x[j];
        }
      }
      lanes.used = true;
      lanes.direct += more + steps;
      lanes.total += more + all;
      lanes.near += near;
      lanes.raised += raised * T(1.4143);  // exp(rest) is at most that
    } else {
      for (int64_t panel = 0; panel < panels; ++panel) op.full(panel);
    }
    if (kMean) lanes.used = true, lanes.mean += mean;
  }

  // The full form: products in fp64. `first`: the panel's first token.
  // `hidden`: a bit for each column that is not to be added.
  void add_full(EffectSums& sums, double (&products)[kW], const Stretch& stretch, int64_t t, int64_t first,
                int64_t here, uint64_t hidden) const {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr int64_t chunk = kColumns<double>;
    double log_p[kW], scratch[chunk];
    for (int64_t j = 0; j < kW; ++j) {
      log_p[j] = -infinity;
      if (j >= here || (hidden >> j & 1) != 0) {
        products[j] = 0;
        continue;
      }
      const double logit = clean_logit(t, first + j);
      log_p[j] = log_probability(t, logit);
      products[j] = changed(products[j], t, logit, stretch);
    }
    Vec<double> gain{}, mean{}, lanes{};
    for (int64_t at = 0; at < kW; at += chunk) {
      Vec<double> x[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        const Vec<double> d = load(products + at + j * kLanes<double>), log = load(log_p + at + j * kLanes<double>);
        const Vec<double> p = log > -infinity ? exponential<double>(log) : Vec<double>{};
        const Vec<double> bounded = -at_least(-at_least(d, broadcast<double>(-700)), broadcast<double>(-700));
        const auto [power, rest] = split<double>(bounded);
        gain += p * (power * rest * less_1<double>(rest) + (power - 1.0));
        mean += p > 0 ? p * d : Vec<double>{};
        x[j] = log + d;
      }
      add_exponentials<double>(sums.exact, lanes, x, scratch, chunk);
    }
    join<double>(sums.exact, lanes);
    sums.gain += sum<double>(gain);
    sums.mean += sum<double>(mean);
  }

  // The sums of a row over the tokens begin..end, made anew in fp64. product(out, first, here): its products.
  template <class Product>
  [[gnu::noinline]] void make_anew(EffectSums& sums, const Stretch& stretch, int64_t t, int64_t begin, int64_t end,
                                   Product product) const {
    sums = {};
    for (int64_t first = begin; first < end; first += kW) {
      double products[kW] = {};
      const int64_t here = smaller(kW, end - first);
      product(products, first, here);
      add_full(sums, products, stretch, t, first, here, 0);
    }
  }

  // Adds the products in fp64 of a row of factors with some columns of a matrix as it was given.
  template <class Factor>
  static void multiply_given(double (&out)[kW], const Factor& factor, int64_t depth, const Source* columns,
                             const int64_t* strides, int64_t here) {
    with_stride(strides[1], [&](auto stride) {
      for (int64_t k = 0; k < depth; ++k) {
        const double by = factor(k);
        for (int64_t j = 0; j < here; ++j) out[j] += by * widen(columns[k * strides[0] + j * stride]);
      }
    });
  }

  static void flush(EffectSums& sums, Vec<T>& small, EffectLanes<T>& lanes) {
    const double less = sum<T>(small);
    sums.gain += less;
    sums.total += less;
    small = Vec<T>{};
    if (!lanes.used) return;
    alignas(64) T of[kL >= 8 ? kL : 8];
    const Vec<T> all[8] = {lanes.direct, lanes.total, lanes.mean, lanes.near, lanes.raised};
    if constexpr (kL >= 8)
      store(of, fc::cpu::FC_TIER::sums<T, 8>(all));
    else
      for (int i = 0; i < 5; ++i) of[i] = sum<T>(all[i]);
    double* const joined[] = {&sums.gain, &sums.total, &sums.mean, &sums.near, &sums.raised};
    for (int i = 0; i < 5; ++i) *joined[i] += of[i];
    lanes = EffectLanes<T>{};
  }

  static EffectTotals totals_of(const EffectSums& sums) {
    return {sums.gain, sums.total, logarithm(sums.exact), sums.mean, sums.near, sums.raised};
  }
};

}  // namespace fc::cpu::FC_TIER

#else
#include "effect_tensors.h"
#endif
