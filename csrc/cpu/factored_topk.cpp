// factored_topk on the CPU: the epilogue compares each tile with a running threshold and keeps what may belong.
// A row costs 2 r M FLOP; its tile is read from the L1 cache once, one comparison for r multiply-adds. In a matrix in
// random order about k ln(N M / k) entries ever pass: of a whole matrix none to speak of, of each of its rows some.
//
// Candidates are ordered by value, then by place (`better`), so that the best k are the same whatever the threads and
// the blocking. The threshold is the k-th best candidate known: it only rises, and what is not better never belongs.
// The hot loop compares values alone, inclusively where a tie could still win; ties are settled when one is collected.
//
// A screen multiplies in bfloat16 first, at half the cost. |screened - exact| <= E for all entries of a tile, so a tile
// whose screened entries all stay E below the threshold is done; any other is made again in full and consumed as ever.
#include <cstdint>

#include "dispatch.h"
#include "product.h"

namespace fc::cpu {

struct Entry {
  double value;   // times `sign`: more is better
  int64_t place;  // row * M + column
};

// NaN is worse than everything else.
static inline bool better(const Entry& a, const Entry& b) {
  if (a.value > b.value) return true;
  if (a.value < b.value) return false;
  const bool nan = a.value != a.value, other = b.value != b.value;
  return nan != other ? other : a.place < b.place;
}

// Of one row, or of all rows of a task.
struct Candidates {
  Entry* entries;
  int64_t count;
  Entry threshold;  // the k-th best known; NaN, in the last place, while fewer than k are
};

struct TopkArguments {
  Product product;
  const void* shift;  // [N] in the accumulator's type, or null
  double sign;        // -1: the smallest
  bool per_row;
  int64_t capacity = 0;                             // of Candidates
  void (*make_room)(void*, Candidates&) = nullptr;  // for a tile's row at least; raises the threshold
  void* context = nullptr;
  const int64_t* news = nullptr;  // changes when another thread has raised the threshold: make_room() fetches it
};

struct TopkKernels {
  int64_t (*column_bytes)(int64_t rank);  // of a packed column
  void (*pack)(const TopkArguments&, void* packed, const Stripe&, int64_t first_column, int64_t end_column);
  void (*search)(const TopkArguments&, const void* packed, const Stripe&, int64_t first_row, int64_t end_row,
                 Candidates*);
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cfloat>
#include <cmath>

namespace fc::cpu::FC_TIER {
namespace {

// A threshold as the hot loop compares with it: x > at_least wherever x >= the threshold. NaN lets everything pass.
template <class T>
struct Bar {
  T above, at_least;
  int64_t place;

  explicit Bar(const Entry& threshold) : above(static_cast<T>(threshold.value)), place(threshold.place) {
    // One unit in the last place or two; beyond denormals, which may count as zero.
    constexpr T unit = sizeof(T) == 4 ? T(FLT_EPSILON) : T(DBL_EPSILON),
                tiny = sizeof(T) == 4 ? T(FLT_MIN) : T(DBL_MIN);
    at_least = above - ((above < 0 ? -above : above) * unit + tiny);
    if (above == -static_cast<T>(__builtin_inf())) at_least = static_cast<T>(__builtin_nan(""));
  }
};

// |screened - exact| <= relative * |a| |b| + absolute * (|a| + |b|) + least, for a row a and a column b of inner
// dimension r, with Euclidean norms (sum |a_k b_k| <= |a| |b|, sum |a_k| <= sqrt(r) |a|):
// - rounding to bfloat16 is off by 2^-8 of a factor, twice a product: 2^-7 + 2^-16;
// - r multiply-adds, each of one or two roundings of at most 2^-23, whatever the order or the direction of rounding,
//   are off by r 2^-22 (doubled: for the higher orders), in bfloat16 and in full each;
// - bfloat16 dot products take denormals for zeros: up to 2^-126 of every factor, product and sum.
// kSlack covers the roundings made here and in subtracting the shift. Norms (and shifts) from which anything could
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

// Without a screen, Screen is Scheme: entries "screened" are the entries.
template <class Scheme, class Source, class Screen, bool kScreened>
struct Search {
  using T = typename Scheme::Accumulator;
  using Right = typename Scheme::Right;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;

  // A stripe as packed: panels for the screen, panels in full, and each panel's largest column norm.
  struct Panels {
    typename Screen::Right* screen;
    Right* full;
    double* norms;

    Panels(void* packed, const Product& p, const Stripe& stripe) {
      const int64_t padded = (stripe.columns + kW - 1) / kW * kW;
      screen = static_cast<typename Screen::Right*>(packed);
      full = reinterpret_cast<Right*>(screen + padded * steps<Screen>(p.rank));
      norms = reinterpret_cast<double*>(full + padded * p.rank);
    }
  };

  struct Waiting : Tile<T> {
    float screen_below;  // screened entries up to this are proven not to belong
  };

  const TopkArguments& s;
  const Product& p;
  const Stripe stripe;
  const Panels panels;
  const int64_t first_row, end_row;
  Candidates* candidates;
  const int64_t each;  // 1: candidates of each row; 0: of all
  const int64_t blocks = (end_row - first_row + kRows - 1) / kRows;
  const ErrorBound error{p.rank};
  Buffer<typename Screen::Left> screen_left{blocks * kRows * steps<Screen>(p.rank)};
  Buffer<typename Scheme::Left> left{kScreened ? blocks * kRows * p.rank : 0};
  Buffer<double> norms{kScreened ? blocks : 0};  // the largest of a block's rows
  Buffer<T> shifts{blocks * kRows};
  Buffer<Bar<T>> bars{each ? blocks * kRows : 1};
  int64_t news = 0;

  static int64_t column_bytes(int64_t rank) {
    return steps<Screen>(rank) * static_cast<int64_t>(sizeof(typename Screen::Right)) +
           (kScreened ? rank * static_cast<int64_t>(sizeof(Right)) + 1 : 0);
  }

  static void pack(const TopkArguments& s, void* packed, const Stripe& stripe, int64_t first_column,
                   int64_t end_column) {
    const Product& p = s.product;
    const Panels panels(packed, p, stripe);
    const int64_t first = first_column / kW, end = (end_column + kW - 1) / kW;
    pack_panels<Screen, Source>(p, stripe, panels.screen, first, end);
    if constexpr (kScreened) {
      pack_panels<Scheme, Source>(p, stripe, panels.full, first, end);
      for (int64_t panel = first; panel < end; ++panel) {
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
  void pack_rows() {
    std::memset(static_cast<void*>(left.data), 0, left.bytes());
    std::memset(static_cast<void*>(screen_left.data), 0, screen_left.bytes());
    std::memset(static_cast<void*>(norms.data), 0, norms.bytes());
    std::memset(static_cast<void*>(shifts.data), 0, shifts.bytes());
    Buffer<T> signed_row{p.rank};
    for (int64_t i = 0; i < end_row - first_row; ++i) {
      const Source* row = static_cast<const Source*>(p.A) + (first_row + i) * p.A_stride[0];
      double squares = 0;
      for (int64_t k = 0; k < p.rank; ++k) {
        signed_row.data[k] = static_cast<T>(s.sign) * widen(row[k * p.A_stride[1]]);
        squares += static_cast<double>(signed_row.data[k]) * static_cast<double>(signed_row.data[k]);
      }
      const int lane = static_cast<int>(i % kRows);
      pack_left<Screen>(screen_left.data + i / kRows * kRows * steps<Screen>(p.rank), lane, signed_row.data, p.rank, 1);
      if (s.shift != nullptr) shifts.data[i] = static_cast<T>(s.sign) * static_cast<const T*>(s.shift)[first_row + i];
      if constexpr (kScreened) {
        pack_left<Scheme>(left.data + i / kRows * kRows * p.rank, lane, signed_row.data, p.rank, 1);
        const double shift = static_cast<double>(shifts.data[i] < 0 ? -shifts.data[i] : shifts.data[i]);
        const double norm = shift < ErrorBound::kHuge ? ErrorBound::norm(squares) : __builtin_inf();
        if (norm > norms.data[i / kRows]) norms.data[i / kRows] = norm;
      }
    }
    // Rows that fill the last block hold nothing.
    for (int64_t i = 0; i < (each ? blocks * kRows : 1); ++i)
      bars.data[i] = Bar<T>(i < end_row - first_row ? candidates[i].threshold : Entry{FLT_MAX, 0});
  }

  void make_room(int64_t i) {
    s.make_room(s.context, candidates[i]);
    bars.data[i] = Bar<T>(candidates[i].threshold);
  }

  // The entries of row i of a tile.
  [[gnu::always_inline]] void entries(const Tile<T>& tile, int i, Vec<T> (&x)[kVectors]) const {
    const Vec<T> shift = broadcast<T>(shifts.data[tile.block * kRows + i]);
    for (int j = 0; j < kVectors; ++j) x[j] = load(tile.products + i * kW + j * kL) - shift;
  }

  int64_t place(const Tile<T>& tile, int i) const {
    return (first_row + tile.block * kRows + i) * p.columns + stripe.first + tile.panel * kW;
  }

  // Entries of row i above this may belong.
  T bound(const Tile<T>& tile, int i) const {
    const Bar<T>& bar = bars.data[(tile.block * kRows + i) * each];
    return bar.place < place(tile, i) ? bar.above : bar.at_least;
  }

  // Whether row i of a tile has an entry that may belong. Inlined: a call would spill the accumulators it runs beside.
  [[gnu::always_inline]] unsigned compare(const Waiting& tile, int i) const {
    Vec<T> x[kVectors];
    entries(tile, i, x);
    return any_above(x, broadcast<T>(kScreened ? tile.screen_below : bound(tile, i)));
  }

  // Block times panel, while the tile before is compared: a bit for each of its rows that may hold an entry that
  // belongs. Not inlined: the accumulators need every register.
  [[gnu::noinline]] unsigned advance(const Waiting waiting, const Waiting next) const {
    unsigned rows = 0;
    const int64_t depth = steps<Screen>(p.rank);
    multiply<Screen>(next.products, screen_left.data + next.block * kRows * depth,
                     panels.screen + next.panel * kW * depth, depth, FromZero{},
                     [&](int i) __attribute__((always_inline)) { rows |= compare(waiting, i) << i; });
    return rows;
  }

  void collect(const Tile<T>& tile, int i) {
    const int64_t row = tile.block * kRows + i;
    if (first_row + row >= end_row) return;
    Vec<T> x[kVectors];
    entries(tile, i, x);
    uint64_t lanes = lanes_above<true>(x, broadcast<T>(bound(tile, i)));
    if (tile.columns < kW) lanes &= (uint64_t{1} << tile.columns) - 1;
    Candidates& found = candidates[row * each];
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t j = __builtin_ctzll(lanes);
      const T entry = tile.products[i * kW + j] - shifts.data[row];
      Entry& out = found.entries[found.count];
      out = {static_cast<double>(entry), place(tile, i) + j};
      found.count += better(out, found.threshold);
    }
    if (found.count + kW > s.capacity) make_room(row * each);
  }

  // The rows of a tile that compare() found.
  [[gnu::noinline]] void consume(Tile<T> tile, unsigned rows) {
    alignas(64) T products[kRows * kW];
    if constexpr (kScreened) {
      tile.products = products;
      multiply<Scheme>(products, left.data + tile.block * kRows * p.rank, panels.full + tile.panel * kW * p.rank,
                       p.rank);
    }
    for (; rows != 0; rows &= rows - 1) collect(tile, __builtin_ctz(rows));
  }

  float screen_below(int64_t block, int64_t panel) const {
    double low = __builtin_inf();
    for (int64_t i = 0; i < (each ? kRows : 1); ++i) {
      const auto bar = static_cast<double>(bars.data[(block * kRows + i) * each].at_least);
      if (bar < low || bar != bar) low = bar;
    }
    return error.below(low, norms.data[block], panels.norms[panel]);
  }

  void run() {
    pack_rows();
    alignas(64) T tiles[2][kRows * kW];
    std::memset(tiles[1], 0, sizeof tiles[1]);
    Waiting waiting{{tiles[1], 0, 0, 0}, 0};
    for (int64_t panel = 0; panel * kW < stripe.columns; ++panel) {
      if (const int64_t now = __atomic_load_n(s.news, __ATOMIC_RELAXED); now != news) {
        news = now;
        make_room(0);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        Waiting next{
            {waiting.products == tiles[0] ? tiles[1] : tiles[0], b, panel, smaller(kW, stripe.columns - panel * kW)},
            0};
        if constexpr (kScreened) next.screen_below = screen_below(b, panel);
        if (const unsigned rows = advance(waiting, next)) consume(waiting, rows);
        waiting = next;
      }
    }
    consume(waiting, (1U << kRows) - 1);
  }

  static void search(const TopkArguments& s, const void* packed, const Stripe& stripe, int64_t first, int64_t end,
                     Candidates* candidates) {
    const Product& p = s.product;
    Search{.s = s,
           .p = p,
           .stripe = stripe,
           .panels = Panels(const_cast<void*>(packed), p, stripe),
           .first_row = first,
           .end_row = end,
           .candidates = candidates,
           .each = s.per_row ? 1 : 0}
        .run();
  }
};

template <class Scheme, class Source, class Screen = Scheme, bool kScreened = false>
const TopkKernels* kernels() {
  using S = Search<Scheme, Source, Screen, kScreened>;
  static constexpr TopkKernels table{S::column_bytes, S::pack, S::search};
  return &table;
}

}  // namespace

// fp32_by_bf16: screened. Null where this tier has no such instruction.
const TopkKernels* topk_kernels(Kind kind) {
  switch (kind) {
    case Kind::fp32:
      return kernels<Ieee<float>, float>();
    case Kind::fp64:
      return kernels<Ieee<double>, double>();
    case Kind::bf16_inputs:
      return kernels<Ieee<float>, BFloat16>();
#if defined(__AVX512BF16__)
    case Kind::fp32_by_bf16:
      return kernels<Ieee<float>, float, Bf16Dot, true>();
#endif
    default:
      return nullptr;
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>

#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

namespace fc::cpu {

FC_TIERS(const TopkKernels*, topk_kernels, Kind)

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTileRow = 48;                // entries collected at a time, at most
constexpr int64_t kInserted = 64;               // k of a row up to which candidates are inserted one by one
constexpr int64_t kRowsBytes = 16 << 20;        // of all candidates of a per-row task
constexpr int64_t kScreenedEntriesAWin = 4096;  // a screen pays where fewer than one entry in so many is wanted
constexpr Entry kNone{std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<int64_t>::max()};

constexpr auto kBetter = [](const Entry& a, const Entry& b) { return better(a, b); };  // inlined, as no function is

// Keeps the best k, in no order but for the k-th, and returns how many there are.
int64_t keep_best(Entry* entries, int64_t count, int64_t k) {
  if (count < k) return count;
  std::nth_element(entries, entries + k - 1, entries + count, kBetter);
  return k;
}

// As keep_best(), in order; the first `kept` are already. A small k takes every candidate in at once this way and has
// the closest threshold.
int64_t insert_best(Entry* entries, int64_t kept, int64_t count, int64_t k) {
  for (int64_t i = kept; i < count; ++i) {
    const Entry entry = entries[i];
    if (kept == k && !better(entry, entries[k - 1])) continue;
    int64_t j = kept < k ? kept++ : k - 1;
    for (; j > 0 && better(entry, entries[j - 1]); --j) entries[j] = entries[j - 1];
    entries[j] = entry;
  }
  return kept;
}

// make_room() of the candidates of one row.
void keep_in_row(void* context, Candidates& found) {
  const int64_t k = *static_cast<const int64_t*>(context);
  const int64_t ordered = found.threshold.place == kNone.place ? 0 : k;
  found.count =
      k <= kInserted ? insert_best(found.entries, ordered, found.count, k) : keep_best(found.entries, found.count, k);
  if (found.count == k) found.threshold = found.entries[k - 1];
}

// The candidates of the whole matrix, to which all threads add theirs.
struct Pool {
  Pool(int64_t k, int64_t added) : k(k) { entries.reserve(static_cast<size_t>(2 * k + added)); }

  void add(Candidates& found) {
    const std::lock_guard lock(mutex);
    entries.insert(entries.end(), found.entries, found.entries + found.count);
    found.count = 0;
    if (static_cast<int64_t>(entries.size()) >= 2 * k) shrink();
    found.threshold = threshold;
  }

  void shrink() {
    entries.resize(static_cast<size_t>(keep_best(entries.data(), static_cast<int64_t>(entries.size()), k)));
    if (!better(entries.back(), threshold)) return;
    threshold = entries.back();
    __atomic_fetch_add(&news, 1, __ATOMIC_RELAXED);
  }

  const int64_t k;
  std::vector<Entry> entries;
  Entry threshold = kNone;
  int64_t news = 0;
  std::mutex mutex;
};

void add_to_pool(void* context, Candidates& found) { static_cast<Pool*>(context)->add(found); }

// Where results lie: [k], or [N,k].
template <class T>
struct Results {
  T* values;
  int64_t *rows, *columns;
  double sign;
  int64_t width;  // M

  void write(int64_t i, const Entry& entry) const {
    values[i] = static_cast<T>(sign * entry.value + 0.0);  // no -0.0
    rows[i] = entry.place / width;
    columns[i] = entry.place % width;
  }
  Entry read(int64_t i) const { return {sign * static_cast<double>(values[i]), rows[i] * width + columns[i]}; }
};

template <class T>
void search_all(TopkArguments& s, const TopkKernels& kernels, int64_t k, const Results<T>& results) {
  const Product& p = s.product;
  s.capacity = std::clamp<int64_t>(2 * k, 64, 2048) + kTileRow;
  Pool pool(k, s.capacity);
  s.make_room = add_to_pool;
  s.context = &pool;
  s.news = &pool.news;
  const int64_t bytes = kernels.column_bytes(p.rank);
  stream(
      p, bytes, rows_a_task(p.rows, bytes, torch::stable::get_num_threads()),
      [&](void* packed, const Stripe& stripe, int64_t first, int64_t end) {
        kernels.pack(s, packed, stripe, first, end);
      },
      [&](const void* packed, const Stripe& stripe, int64_t first, int64_t end) {
        const std::unique_ptr<Entry[]> entries(new Entry[static_cast<size_t>(s.capacity)]);
        Candidates found{entries.get(), 0, kNone};
        kernels.search(s, packed, stripe, first, end, &found);
        pool.add(found);
      });
  pool.shrink();
  std::sort(pool.entries.begin(), pool.entries.end(), kBetter);
  for (int64_t i = 0; i < k; ++i) results.write(i, pool.entries[static_cast<size_t>(i)]);
}

// What earlier stripes found in a row is read back from the results, and goes on from there.
template <class T>
void search_rows(TopkArguments& s, const TopkKernels& kernels, int64_t k, const Results<T>& results) {
  const Product& p = s.product;
  const int64_t nothing_new = 0;
  s.capacity = std::min(k <= kInserted ? k : 2 * k, p.columns) + kTileRow;
  s.make_room = keep_in_row;
  s.context = &k;
  s.news = &nothing_new;
  const int64_t bytes = kernels.column_bytes(p.rank), held = s.capacity * static_cast<int64_t>(sizeof(Entry));
  const int64_t rows_at_once = std::min(rows_a_task(p.rows, bytes, torch::stable::get_num_threads()),
                                        std::max<int64_t>(8, kRowsBytes / held / 8 * 8));
  stream(
      p, bytes, rows_at_once,
      [&](void* packed, const Stripe& stripe, int64_t first, int64_t end) {
        kernels.pack(s, packed, stripe, first, end);
      },
      [&](const void* packed, const Stripe& stripe, int64_t first, int64_t end) {
        const std::unique_ptr<Entry[]> entries(new Entry[static_cast<size_t>((end - first) * s.capacity)]);
        std::vector<Candidates> found;
        for (int64_t row = first; row < end; ++row) {
          found.push_back({entries.get() + (row - first) * s.capacity, std::min(k, stripe.first), kNone});
          Candidates& mine = found.back();
          for (int64_t i = 0; i < mine.count; ++i) mine.entries[i] = results.read(row * k + i);
          if (mine.count == k) mine.threshold = mine.entries[k - 1];
        }
        kernels.search(s, packed, stripe, first, end, found.data());
        for (int64_t row = first; row < end; ++row) {
          Candidates& mine = found[static_cast<size_t>(row - first)];
          mine.count = keep_best(mine.entries, mine.count, k);
          std::sort(mine.entries, mine.entries + mine.count, kBetter);
          for (int64_t i = 0; i < mine.count; ++i) results.write(row * k + i, mine.entries[i]);
        }
      });
}

const TopkKernels& kernels_of(ScalarType dtype, const std::string& screen, bool pays) {
  STD_TORCH_CHECK(screen == "auto" || screen == "none" || screen == "bf16", "screen is '", screen,
                  "', expected 'auto', 'none' or 'bf16'");
  const Kind kind = kind_of("A", dtype);
  if (screen == "bf16") {
    STD_TORCH_CHECK(kind == Kind::fp32, "screen is 'bf16' but A is ", kind == Kind::fp64 ? "float64" : "bfloat16",
                    "; a screen in bfloat16 is for float32 factors");
    const TopkKernels* found = pick_topk_kernels(Kind::fp32_by_bf16);
    check_instructions(found != nullptr, "screen");
    return *found;
  }
  const bool wanted = screen == "auto" && pays && kind == Kind::fp32;
  const TopkKernels* found = wanted ? pick_topk_kernels(Kind::fp32_by_bf16) : nullptr;
  return *(found != nullptr ? found : pick_topk_kernels(kind));
}

std::tuple<Tensor, Tensor, Tensor> factored_topk(const Tensor& A, const Tensor& B, int64_t k, bool largest,
                                                 bool per_row, const std::optional<Tensor>& shift,
                                                 const std::string& screen) {
  const Product p = product_of(A, B);
  const int64_t most = per_row ? p.columns : p.rows * p.columns;
  STD_TORCH_CHECK(k >= 1 && k <= most, "k is ", k, ", expected 1 to ", most);
  const bool pays = !per_row && k <= p.rows * p.columns / kScreenedEntriesAWin;
  const TopkKernels& kernels = kernels_of(A.scalar_type(), screen, pays);
  const ScalarType dtype = A.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> shift_c;
  if (shift.has_value()) {
    FC_CHECK_SHAPE(*shift, (Shape{p.rows}));
    shift_c = torch::stable::contiguous(torch::stable::to(*shift, dtype));
  }

  const std::vector<int64_t> size = per_row ? std::vector<int64_t>{p.rows, k} : std::vector<int64_t>{k};
  Tensor values = torch::stable::new_empty(A, size, dtype);
  Tensor rows = torch::stable::new_empty(A, size, ScalarType::Long);
  Tensor columns = torch::stable::new_empty(A, size, ScalarType::Long);
  TopkArguments arguments{.product = p,
                          .shift = shift_c.has_value() ? shift_c->data_ptr() : nullptr,
                          .sign = largest ? 1.0 : -1.0,
                          .per_row = per_row};
  const auto run = [&]<class T>(T* out) {
    const Results<T> results{out, static_cast<int64_t*>(rows.data_ptr()), static_cast<int64_t*>(columns.data_ptr()),
                             arguments.sign, p.columns};
    if (per_row)
      search_rows(arguments, kernels, k, results);
    else
      search_all(arguments, kernels, k, results);
  };
  if (dtype == ScalarType::Double)
    run(static_cast<double*>(values.data_ptr()));
  else
    run(static_cast<float*>(values.data_ptr()));
  return {values, rows, columns};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("factored_topk", TORCH_BOX(&fc::cpu::factored_topk)); }

#endif
