// factored_topk on the CPU: the k best entries of A @ B - shift[:, None], or of each of its rows, without the product.
// The epilogue compares each tile with a running threshold and collects what may belong; topk_selection.h keeps the
// best of it.
//
// A row costs 2 r M FLOP; its tile is read from the L1 cache once, at one comparison for r multiply-adds. In a matrix
// in random order about k ln(N M / k) entries ever pass: of a whole matrix none to speak of, of each of its rows some.
//
// The hot loop compares values alone, inclusively where a tie could still win; ties are settled when an entry is
// collected.
//
// With a screen, tiles are multiplied in bfloat16 first, at half the cost. All entries of a tile have
// |screened - exact| <= E, so a tile whose screened entries all stay E below the threshold is done; any other is made
// again in full precision and compared as ever.
#pragma once

#include "product.h"
#include "topk_selection.h"

namespace fc::cpu {

struct TopkArguments {
  Product product;
  const void* shift;  // [N] in the accumulator's type, or null: subtracted from each row
  double sign;        // -1: the smallest
  bool per_row;
  int64_t capacity = 0;                             // of Candidates
  void (*make_room)(void*, Candidates&) = nullptr;  // for a tile's row at least; raises the threshold
  void* context = nullptr;
  const int64_t* times_raised = nullptr;  // changes when another thread raises the threshold, which make_room() fetches
};

struct TopkKernels {
  int64_t (*column_bytes)(int64_t rank);  // of a packed column
  void (*pack)(const TopkArguments&, const Stripe&, int64_t first_column, int64_t end_column);
  void (*search)(const TopkArguments&, const Stripe&, int64_t first_row, int64_t end_row, Candidates*);
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cfloat>
#include <cmath>

namespace fc::cpu::FC_TIER {

// A threshold as the hot loop compares with it: x > at_least wherever x >= the threshold. NaN lets everything pass.
template <class T>
struct Threshold {
  T above, at_least;
  int64_t place;

  explicit Threshold(const Entry& entry) : above(static_cast<T>(entry.value)), place(entry.place) {
    // One unit in the last place or two; beyond denormals, which may count as zero.
    constexpr T unit = sizeof(T) == 4 ? T(FLT_EPSILON) : T(DBL_EPSILON),
                tiny = sizeof(T) == 4 ? T(FLT_MIN) : T(DBL_MIN);
    at_least = above - ((above < 0 ? -above : above) * unit + tiny);
    if (above == -static_cast<T>(__builtin_inf())) at_least = static_cast<T>(__builtin_nan(""));
  }
};

// How far a screened entry may be from the exact one. For a row a and a column b of inner dimension r,
// |screened - exact| <= relative * |a| |b| + absolute * (|a| + |b|) + least in Euclidean norms, by
// sum |a_k b_k| <= |a| |b| and sum |a_k| <= sqrt(r) |a|:
// - rounding to bfloat16 is off by 2^-8 of a factor, twice a product: 2^-7 + 2^-16;
// - r multiply-adds, each of one or two roundings of at most 2^-23, whatever the order or the direction of rounding,
//   are off by r 2^-22 (doubled: for the higher orders), in bfloat16 and in full each;
// - bfloat16 dot products take denormals for zeros: up to 2^-126 of every factor, product and sum.
// kSlack covers the roundings made here and in subtracting the shift. Norms and shifts so large that something could
// overflow count as infinite.
struct ErrorBound {
  static constexpr double kDenormal = 0x1p-126, kHuge = 1e37, kSlack = 0x1p-18;
  double relative, absolute, least;

  explicit ErrorBound(int64_t rank) {
    const double steps = static_cast<double>(rank) + 2;
    relative = (0x1p-7 + 0x1p-16 + 4 * steps * 0x1p-22) * (1 + kSlack);
    absolute = 2 * std::sqrt(steps) * kDenormal;
    least = 8 * steps * kDenormal;
    if (steps > 0x1p18) relative = __builtin_inf();
  }
  static double norm(double squares) {
    const double out = std::sqrt(squares);
    return out < kHuge ? out : __builtin_inf();
  }
  // The highest screened entry that proves the exact one to be at most `low`; NaN where nothing does.
  float below(double low, double a, double b) const {
    const double error = relative * a * b + absolute * (a + b) + least;
    if (!(error < kHuge)) return __builtin_nanf("");
    return static_cast<float>(low - error - ((low < 0 ? -low : low) + error) * kSlack - 4 * kDenormal);
  }
};

// A Scheme that rounds to bfloat16 is a screen. Without one, the entries "screened" are the entries themselves.
template <class Screen, class Source>
struct Search {
  using T = typename Screen::Accumulator;
  using Exact = Ieee<T>;
  static constexpr bool kScreened = !std::is_same_v<Screen, Exact>;
  static constexpr int64_t kW = kWidth<Screen>;

  // A stripe as packed: panels for the screen, panels in full, and each panel's largest column norm.
  struct Panels {
    typename Screen::Right* screen;
    T* full;
    double* norms;

    Panels(const Product& p, const Stripe& stripe) {
      const int64_t padded = panels_of<Screen>(stripe.columns) * kW;
      screen = static_cast<typename Screen::Right*>(stripe.packed);
      full = reinterpret_cast<T*>(screen + padded * steps<Screen>(p.rank));
      norms = reinterpret_cast<double*>(full + padded * p.rank);
    }
  };

  struct Tile : FC_TIER::Tile<T> {
    float screen_below;  // screened entries up to this are proven not to belong
  };

  const TopkArguments& s;
  const Stripe stripe;
  const int64_t first_row, end_row;
  Candidates* candidates;
  const Product& p = s.product;
  const Panels panels{p, stripe};
  const int64_t list_stride = s.per_row ? 1 : 0;  // 1: each row has candidates of its own; 0: all rows share them
  const int64_t blocks = blocks_of(end_row - first_row);
  const ErrorBound error{p.rank};
  Buffer<typename Screen::Left> screen_left{blocks * kRows * steps<Screen>(p.rank)};
  Buffer<T> left{kScreened ? blocks * kRows * p.rank : 0};
  Buffer<double> norms{kScreened ? blocks : 0};  // the largest of a block's rows
  Buffer<T> shifts{blocks * kRows};
  Buffer<Threshold<T>> thresholds{list_stride ? blocks * kRows : 1};

  static int64_t column_bytes(int64_t rank) {
    return steps<Screen>(rank) * static_cast<int64_t>(sizeof(typename Screen::Right)) +
           (kScreened ? rank * static_cast<int64_t>(sizeof(T)) + 1 : 0);  // and a share of the panel's norm
  }

  static void pack(const TopkArguments& s, const Stripe& stripe, int64_t first, int64_t end) {
    const Product& p = s.product;
    const Panels panels(p, stripe);
    pack_columns<Screen, Source>(p, stripe, panels.screen, first, end);
    if constexpr (kScreened) {
      pack_columns<Exact, Source>(p, stripe, panels.full, first, end);
      for (int64_t panel = first / kW; panel * kW < end; ++panel) {
        double squares[kW] = {}, largest = 0;
        for (int64_t k = 0; k < p.rank; ++k)
          for (int64_t j = 0; j < kW; ++j) {
            const double x = panels.full[(panel * p.rank + k) * kW + j];
            squares[j] += x * x;
          }
        for (const double x : squares) largest = x > largest ? x : largest;
        panels.norms[panel] = ErrorBound::norm(largest);
      }
    }
  }

  // The smallest entries are the largest of -A: negation is exact.
  void pack_left_side() {
    std::memset(static_cast<void*>(left.data), 0, left.bytes());
    std::memset(static_cast<void*>(screen_left.data), 0, screen_left.bytes());
    std::memset(static_cast<void*>(norms.data), 0, norms.bytes());
    std::memset(static_cast<void*>(shifts.data), 0, shifts.bytes());
    Buffer<T> signed_row{p.rank};
    for (int64_t i = 0; i < end_row - first_row; ++i) {
      const Source* row = static_cast<const Source*>(p.A.data) + (first_row + i) * p.A.stride[0];
      double squares = 0;
      for (int64_t k = 0; k < p.rank; ++k) {
        signed_row.data[k] = static_cast<T>(s.sign) * widen(row[k * p.A.stride[1]]);
        squares += static_cast<double>(signed_row.data[k]) * static_cast<double>(signed_row.data[k]);
      }
      pack_left<Screen>(screen_left.data, i, signed_row.data, p.rank, 1);
      if (s.shift != nullptr) shifts.data[i] = static_cast<T>(s.sign) * static_cast<const T*>(s.shift)[first_row + i];
      if constexpr (kScreened) {
        pack_left<Exact>(left.data, i, signed_row.data, p.rank, 1);
        const double shift = static_cast<double>(shifts.data[i] < 0 ? -shifts.data[i] : shifts.data[i]);
        const double norm = shift < ErrorBound::kHuge ? ErrorBound::norm(squares) : __builtin_inf();
        if (norm > norms.data[i / kRows]) norms.data[i / kRows] = norm;
      }
    }
    // Of rows that only fill the last block, no entry belongs.
    for (int64_t i = 0; i < (list_stride ? blocks * kRows : 1); ++i)
      thresholds.data[i] = Threshold<T>(i < end_row - first_row ? candidates[i].threshold : Entry{FLT_MAX, 0});
  }

  void make_room(int64_t list) {
    s.make_room(s.context, candidates[list]);
    thresholds.data[list] = Threshold<T>(candidates[list].threshold);
  }

  // The entries of row i of a tile.
  [[gnu::always_inline]] void entries(const FC_TIER::Tile<T>& tile, int i, Vec<T> (&x)[kVectors]) const {
    const Vec<T> shift = broadcast<T>(shifts.data[tile.block * kRows + i]);
    for (int j = 0; j < kVectors; ++j) x[j] = load(tile.products + i * kW + j * kLanes<T>) - shift;
  }

  int64_t place(const FC_TIER::Tile<T>& tile, int i) const {
    return (first_row + tile.block * kRows + i) * p.columns + stripe.first + tile.panel * kW;
  }

  // Entries of row i above this may belong. On equal values, those in earlier places than the threshold's win.
  T bound(const FC_TIER::Tile<T>& tile, int i) const {
    const Threshold<T>& threshold = thresholds.data[(tile.block * kRows + i) * list_stride];
    return threshold.place < place(tile, i) ? threshold.above : threshold.at_least;
  }

  // Screened entries up to this are proven not to belong to any row of a block.
  float screen_below(int64_t block, int64_t panel) const {
    double low = __builtin_inf();
    for (int64_t i = 0; i < (list_stride ? kRows : 1); ++i) {
      const auto threshold = static_cast<double>(thresholds.data[(block * kRows + i) * list_stride].at_least);
      if (threshold < low || threshold != threshold) low = threshold;
    }
    return error.below(low, norms.data[block], panels.norms[panel]);
  }

  Tile next(T* products, int64_t block, int64_t panel) const {
    Tile tile{{products, block, panel, smaller(kW, stripe.columns - panel * kW)}, 0};
    if constexpr (kScreened) tile.screen_below = screen_below(block, panel);
    return tile;
  }

  // Whether row i of a tile has an entry that may belong.
  [[gnu::always_inline]] bool consume(const Tile& tile, int i) const {
    Vec<T> x[kVectors];
    entries(tile, i, x);
    return any_above(x, broadcast<T>(kScreened ? tile.screen_below : bound(tile, i)));
  }

  // Collects from the rows of a tile that may have such entries.
  [[gnu::noinline]] void revisit(FC_TIER::Tile<T> tile, unsigned rows) {
    alignas(64) T products[kRows * kW];
    if constexpr (kScreened) {
      tile.products = products;
      multiply<Exact>(products, left.data + tile.block * kRows * p.rank, panels.full + tile.panel * kW * p.rank,
                      p.rank);
    }
    for (; rows != 0; rows &= rows - 1) collect(tile, __builtin_ctz(rows));
  }

  void collect(const FC_TIER::Tile<T>& tile, int i) {
    const int64_t row = tile.block * kRows + i;
    if (first_row + row >= end_row) return;
    Vec<T> x[kVectors];
    entries(tile, i, x);
    uint64_t lanes = lanes_above<true>(x, broadcast<T>(bound(tile, i)));
    if (tile.columns < kW) lanes &= (uint64_t{1} << tile.columns) - 1;
    Candidates& found = candidates[row * list_stride];
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t j = __builtin_ctzll(lanes);
      const T entry = tile.products[i * kW + j] - shifts.data[row];
      Entry& out = found.entries[found.count];
      out = {static_cast<double>(entry), place(tile, i) + j};
      found.count += better(out, found.threshold);
    }
    if (found.count + kW > s.capacity) make_room(row * list_stride);
  }

  void run() {
    pack_left_side();
    Walk<Screen, Search> walk(*this, screen_left.data, panels.screen, steps<Screen>(p.rank));
    int64_t known = 0;
    for (int64_t panel = 0; panel * kW < stripe.columns; ++panel) {
      if (panel % kPanelsALook == 0) look_for_interrupt();
      if (const int64_t now = __atomic_load_n(s.times_raised, __ATOMIC_RELAXED); now != known) {
        known = now;
        make_room(0);
      }
      walk.panel(panel, 0, blocks);
    }
  }

  static void search(const TopkArguments& s, const Stripe& stripe, int64_t first, int64_t end, Candidates* candidates) {
    Search{.s = s, .stripe = stripe, .first_row = first, .end_row = end, .candidates = candidates}.run();
  }

  static const TopkKernels* kernels() {
    static constexpr TopkKernels table{column_bytes, pack, search};
    return &table;
  }
};

// fp32 factors multiplied by bfloat16 dot products are a screen.
const TopkKernels* topk_kernels(Arithmetic arithmetic) { return select<Search, Dots::fp32>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#endif
