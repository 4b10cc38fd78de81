// diagonal_ranks on the CPU: the epilogue compares each tile with one entry of each of its rows and counts.
// A row costs 2 r M FLOP; its tile is read from the L1 cache once, one comparison for r multiply-adds.
#include <cstdint>

#include "dispatch.h"
#include "product.h"

namespace fc::cpu {

struct RankArguments {
  Product product;
  const int64_t* columns;  // [N]: the entry of each row to compare with
  int64_t* ranks;          // [N]
};

struct RankKernels {
  int64_t column_bytes_of_rank;  // of a packed column, for each inner index
  void (*pack)(const RankArguments&, void* packed, const Stripe&, int64_t first_column, int64_t end_column);
  void (*count)(const RankArguments&, const void* packed, const Stripe&, int64_t first_row, int64_t end_row);
};

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

template <class Scheme, class Source>
struct Ranks {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;
  static_assert(kRows <= kW && Scheme::kDepth == 1);

  const RankArguments& s;
  const Product& p = s.product;
  const typename Scheme::Right* panels;
  const Stripe stripe;
  const int64_t first_row, end_row;
  const int64_t blocks = (end_row - first_row + kRows - 1) / kRows;
  Buffer<typename Scheme::Left> left{blocks * kRows * p.rank};
  Buffer<T> entries{blocks * kRows};
  Buffer<int64_t> counts{blocks * kRows};

  static void pack(const RankArguments& s, void* packed, const Stripe& stripe, int64_t first, int64_t end) {
    pack_panels<Scheme, Source>(s.product, stripe, static_cast<typename Scheme::Right*>(packed), first / kW,
                                (end + kW - 1) / kW);
  }

  void pack_rows() {
    std::memset(static_cast<void*>(left.data), 0, left.bytes());
    for (int64_t row = first_row; row < end_row; ++row)
      pack_left<Scheme>(left.data + (row - first_row) / kRows * kRows * p.rank,
                        static_cast<int>((row - first_row) % kRows),
                        static_cast<const Source*>(p.A) + row * p.A_stride[0], p.rank, p.A_stride[1]);
  }

  // The entries to compare with, as the tile core makes them: row i of a block times column i of a panel of its own.
  void make_entries() {
    Buffer<typename Scheme::Right> panel{p.rank * kW};
    alignas(64) T tile[kRows * kW];
    std::memset(static_cast<void*>(panel.data), 0, panel.bytes());
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t row = smaller(first_row + b * kRows + i, end_row - 1);
        const Source* column = static_cast<const Source*>(p.B) + s.columns[row] * p.B_stride[1];
        for (int64_t k = 0; k < p.rank; ++k)
          panel.data[k * kW + i] = Scheme::right(column + k * p.B_stride[0], p.B_stride[0], p.rank - k);
      }
      multiply<Scheme>(tile, left.data + b * kRows * p.rank, panel.data, p.rank);
      for (int64_t i = 0; i < kRows; ++i) entries.data[b * kRows + i] = tile[i * kW + i];
    }
  }

  // Inlined: a call would spill the accumulators it runs beside.
  [[gnu::always_inline]] void consume(const Tile<T>& tile, int i) {
    const int64_t row = tile.block * kRows + i;
    Vec<T> x[kVectors];
    for (int j = 0; j < kVectors; ++j) x[j] = load(tile.products + i * kW + j * kL);
    const T entry = entries.data[row];
    counts.data[row] +=
        __builtin_popcountll(lanes_above<false>(x, broadcast<T>(entry))) - (T(0) > entry ? kW - tile.columns : 0);
  }

  // Block times panel, while the tile before is consumed. Not inlined: the accumulators need every register.
  [[gnu::noinline]] void advance(const Tile<T> waiting, const Tile<T> next) {
    multiply<Scheme>(next.products, left.data + next.block * kRows * p.rank, panels + next.panel * kW * p.rank, p.rank,
                     FromZero{}, [&](int i) __attribute__((always_inline)) { consume(waiting, i); });
  }

  void run() {
    pack_rows();
    make_entries();
    std::memset(static_cast<void*>(counts.data), 0, counts.bytes());
    alignas(64) T tiles[2][kRows * kW];
    std::memset(tiles[1], 0, sizeof tiles[1]);
    Tile<T> waiting{tiles[1], 0, 0, 0};
    for (int64_t panel = 0; panel * kW < stripe.columns; ++panel)
      for (int64_t b = 0; b < blocks; ++b) {
        const Tile<T> next{waiting.products == tiles[0] ? tiles[1] : tiles[0], b, panel,
                           smaller(kW, stripe.columns - panel * kW)};
        advance(waiting, next);
        waiting = next;
      }
    for (int i = 0; i < kRows; ++i) consume(waiting, i);
    for (int64_t row = first_row; row < end_row; ++row) s.ranks[row] += counts.data[row - first_row];
  }

  static void count(const RankArguments& s, const void* packed, const Stripe& stripe, int64_t first, int64_t end) {
    Ranks{.s = s,
          .panels = static_cast<const typename Scheme::Right*>(packed),
          .stripe = stripe,
          .first_row = first,
          .end_row = end}
        .run();
  }
};

template <class Scheme, class Source>
const RankKernels* kernels() {
  using R = Ranks<Scheme, Source>;
  static constexpr RankKernels table{sizeof(typename Scheme::Right), R::pack, R::count};
  return &table;
}

}  // namespace

const RankKernels* rank_kernels(Kind kind) {
  switch (kind) {
    case Kind::fp32:
      return kernels<Ieee<float>, float>();
    case Kind::fp64:
      return kernels<Ieee<double>, double>();
    default:
      return kernels<Ieee<float>, BFloat16>();
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>

namespace fc::cpu {

FC_TIERS(const RankKernels*, rank_kernels, Kind)

namespace {

Tensor diagonal_ranks(const Tensor& A, const Tensor& B, const Tensor& columns) {
  const Product product = product_of(A, B);
  FC_CHECK_SHAPE(columns, (Shape{product.rows}));
  STD_TORCH_CHECK(columns.scalar_type() == torch::headeronly::ScalarType::Long, "columns must be int64");
  const RankKernels& kernels = *pick_rank_kernels(kind_of("A", A.scalar_type()));
  const Tensor columns_c = torch::stable::contiguous(columns);
  const auto* chosen = static_cast<const int64_t*>(columns_c.data_ptr());
  for (int64_t i = 0; i < product.rows; ++i)
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < product.columns, "columns[", i, "] is ", chosen[i],
                    ", expected 0 to ", product.columns - 1);

  Tensor ranks = torch::stable::new_empty(A, {product.rows}, torch::headeronly::ScalarType::Long);
  const RankArguments arguments{product, chosen, static_cast<int64_t*>(ranks.data_ptr())};
  std::fill_n(arguments.ranks, product.rows, int64_t{0});
  const int64_t bytes = product.rank * kernels.column_bytes_of_rank;
  stream(
      product, bytes, rows_a_task(product.rows, bytes, torch::stable::get_num_threads()),
      [&](void* packed, const Stripe& stripe, int64_t first, int64_t end) {
        kernels.pack(arguments, packed, stripe, first, end);
      },
      [&](const void* packed, const Stripe& stripe, int64_t first, int64_t end) {
        kernels.count(arguments, packed, stripe, first, end);
      });
  return ranks;
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("diagonal_ranks", TORCH_BOX(&fc::cpu::diagonal_ranks)); }

#endif
