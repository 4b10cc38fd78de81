// diagonal_ranks on the CPU: how many entries of each row of A @ B are above one entry of the row. The epilogue
// compares each tile with that entry and counts. A row costs 2 r M FLOP; its tile is read from the L1 cache once, at
// one comparison for r multiply-adds.
#include "product.h"

namespace fc::cpu {

struct RankArguments {
  Product product;
  const int64_t* columns;  // [N]: the entry of each row to compare with
  int64_t* ranks;          // [N]
};

struct RankKernels {
  int64_t (*column_bytes)(int64_t rank);  // of a packed column
  void (*pack)(const RankArguments&, const Stripe&, int64_t first_column, int64_t end_column);
  void (*count)(const RankArguments&, const Stripe&, int64_t first_row, int64_t end_row);
};

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

template <class Scheme, class Source>
struct Ranks {
  using T = typename Scheme::Accumulator;
  using Tile = FC_TIER::Tile<T>;
  static constexpr int64_t kW = kWidth<Scheme>;
  static_assert(kRows <= kW && Scheme::kDepth == 1);

  const RankArguments& s;
  const Stripe stripe;
  const int64_t first_row, end_row;
  const Product& p = s.product;
  const int64_t blocks = blocks_of(end_row - first_row);
  Buffer<typename Scheme::Left> left{blocks * kRows * p.rank};
  Buffer<T> entries{blocks * kRows};
  Buffer<int64_t> counts{blocks * kRows};

  // The entries to compare with, made as the walk makes them: row i of a block times column i of a panel of its own.
  void make_entries() {
    Buffer<typename Scheme::Right> panel{p.rank * kW};
    alignas(64) T tile[kRows * kW];
    std::memset(static_cast<void*>(panel.data), 0, panel.bytes());
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t row = smaller(first_row + b * kRows + i, end_row - 1);
        const Source* column = static_cast<const Source*>(p.B.data) + s.columns[row] * p.B.stride[1];
        for (int64_t k = 0; k < p.rank; ++k)
          panel.data[k * kW + i] = Scheme::right(column + k * p.B.stride[0], p.B.stride[0], p.rank - k);
      }
      multiply<Scheme>(tile, left.data + b * kRows * p.rank, panel.data, p.rank);
      for (int64_t i = 0; i < kRows; ++i) entries.data[b * kRows + i] = tile[i * kW + i];
    }
  }

  Tile next(T* products, int64_t block, int64_t panel) const {
    return {products, block, panel, smaller(kW, stripe.columns - panel * kW)};
  }

  // Counts what is above the row's entry, without the zeros of the padding.
  [[gnu::always_inline]] void consume(const Tile& tile, int i) {
    const int64_t row = tile.block * kRows + i;
    Vec<T> x[kVectors];
    for (int j = 0; j < kVectors; ++j) x[j] = load(tile.products + i * kW + j * kLanes<T>);
    const T entry = entries.data[row];
    counts.data[row] +=
        __builtin_popcountll(lanes_above<false>(x, broadcast<T>(entry))) - (T(0) > entry ? kW - tile.columns : 0);
  }

  void run() {
    pack_rows<Scheme>(left.data, static_cast<const Source*>(p.A.data) + first_row * p.A.stride[0], end_row - first_row,
                      p.rank, p.A.stride[0], p.A.stride[1]);
    make_entries();
    std::memset(static_cast<void*>(counts.data), 0, counts.bytes());
    Walk<Scheme, Ranks> walk(*this, left.data, static_cast<const typename Scheme::Right*>(stripe.packed), p.rank);
    for (int64_t panel = 0; panel * kW < stripe.columns; ++panel) {
      if (panel % kPanelsALook == 0) look_for_interrupt();
      walk.panel(panel, 0, blocks);
    }
    for (int64_t row = first_row; row < end_row; ++row) s.ranks[row] += counts.data[row - first_row];
  }

  static int64_t column_bytes(int64_t rank) { return rank * static_cast<int64_t>(sizeof(typename Scheme::Right)); }
  static void pack(const RankArguments& s, const Stripe& stripe, int64_t first, int64_t end) {
    pack_columns<Scheme, Source>(s.product, stripe, static_cast<typename Scheme::Right*>(stripe.packed), first, end);
  }
  static void count(const RankArguments& s, const Stripe& stripe, int64_t first, int64_t end) {
    Ranks{.s = s, .stripe = stripe, .first_row = first, .end_row = end}.run();
  }
  static const RankKernels* kernels() {
    static constexpr RankKernels table{column_bytes, pack, count};
    return &table;
  }
};

}  // namespace

const RankKernels* rank_kernels(Arithmetic arithmetic) { return select<Ranks, Dots::none>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(const RankKernels*, rank_kernels, Arithmetic)

namespace {

Tensor diagonal_ranks(const Tensor& A, const Tensor& B, const Tensor& columns) {
  Sizes sizes = check_product(A, B);
  sizes("columns", columns, "N", Kind::index);
  FC_CHECK(sizes["M"] > 0 || sizes["N"] == 0, "B has shape ", shape_of(B), ": no columns");
  const Product product = product_of(A, B);
  const RankKernels& kernels = *pick_rank_kernels(arithmetic_of("A", A));
  const Tensor columns_c = torch::stable::contiguous(columns);
  const auto* chosen = data_of<const int64_t>(columns_c);
  check_indices("columns", chosen, product.rows, product.columns);

  Tensor ranks = torch::stable::new_empty(A, {product.rows}, ScalarType::Long);
  const RankArguments arguments{product, chosen, data_of<int64_t>(ranks)};
  std::fill_n(arguments.ranks, product.rows, int64_t{0});
  stream(kernels, arguments, kMostRows,
         [&](const Stripe& stripe, int64_t first, int64_t end) { kernels.count(arguments, stripe, first, end); });
  return ranks;
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("diagonal_ranks", TORCH_BOX(&fc::cpu::diagonal_ranks)); }

#endif
