// Streaming through a product A @ B without storing it: B is packed once for all threads, a stripe of columns at a time
// where the whole would be large, and a task takes some rows of A past all panels of the stripe. The walk over the
// tiles of a task is here too; ops whose right factor is packed otherwise (sweep.h) use it as well.
#pragma once

#include "dispatch.h"
#include "interrupts.h"
#include "isa.h"

namespace fc::cpu {

struct Product {
  Strided<2> A, B;              // [N,r] and [r,M] of one type
  int64_t rows, columns, rank;  // N, M, r
};

struct Stripe {  // of columns
  void* packed;
  int64_t first, columns;
};

// Columns that one task packs: whole panels of every tier, whatever the type.
inline constexpr int64_t kColumnsAPack = 16 * kWidestPanel;

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {

// A tile of products, and where it lies.
template <class T>
struct Tile {
  T* products;      // [kRows][kColumns], in the L1 cache
  int64_t block;    // of the task's rows
  int64_t panel;    // of the stripe
  int64_t columns;  // the products of those past them are exactly zero
};

// How many panels a tile may span: what is done once for each row of a tile is little beside several panels of it.
inline constexpr int64_t kTogether = 4;
static_assert(kPanelsAStripe % kTogether == 0);
static inline int64_t tiles_of(int64_t panels) { return (panels + kTogether - 1) / kTogether; }

// The walk over the tiles of a product, block after block for each panel. A tile is consumed when it is made. To
// consume it in the shadow of the next one's multiply-adds was slower for sweep_nll and joint_nll, and hardly faster
// for the others (AVX-512): the accumulators leave too few registers for two loops at once. An Op has
//   Tile: what it needs to know of a tile; `products` is where they are;
//   next(products, block, panel): the Tile to make next; its products may go to memory of the op's own;
//   more(tile, i): where the products of the i-th panel after the tile's go, if it has several;
//   consume(tile, i): takes row i of a tile. It returns nothing, or whether the row is to be looked at again: then the
//     op also has
//   revisit(tile, rows): looks at rows of a consumed tile again, a bit for each.
template <class Scheme, class Op>
class Walk {
  using T = typename Scheme::Accumulator;
  using Tile = typename Op::Tile;
  using Left = typename Scheme::Left;
  using Right = typename Scheme::Right;

 public:
  // Blocks and panels are of `depth` steps each.
  Walk(Op& op, const Left* blocks, const Right* panels, int64_t depth)
      : op(op), blocks(blocks), panels(panels), depth(depth) {}

  // Multiplies blocks first..end by one panel, or by up to kTogether panels, next() permitting.
  void panel(int64_t panel, int64_t first_block, int64_t end_block, int64_t count = 1) {
    for (int64_t block = first_block; block < end_block; ++block) {
      const Tile tile = op.next(buffer, block, panel);
      const Left* rows = blocks + block * kRows * depth;
      const Right* columns = panels + panel * kWidth<Scheme> * depth;
      make(tile.products, rows, columns);
      if constexpr (requires { op.more(tile, 1); })
        for (int64_t more = 1; more < count; ++more)
          make(op.more(tile, more), rows, columns + more * kWidth<Scheme> * depth);
      consume(tile);
    }
  }

 private:
  void consume(const Tile& tile) {
    if constexpr (requires { op.revisit(tile, 0U); }) {
      unsigned again = 0;
      for (int i = 0; i < kRows; ++i) again |= static_cast<unsigned>(op.consume(tile, i)) << i;
      if (again != 0) op.revisit(tile, again);
    } else {
      for (int i = 0; i < kRows; ++i) op.consume(tile, i);
    }
  }

  // Not inlined: the accumulators need every register.
  [[gnu::noinline]] void make(T* products, const Left* rows, const Right* columns) const {
    multiply<Scheme>(products, rows, columns, depth);
  }

  Op& op;
  const Left* const blocks;
  const Right* const panels;
  const int64_t depth;
  alignas(64) T buffer[kTogether * kRows * kWidth<Scheme>];
};

// Panels that a task walks over between two looks for an interrupt.
inline constexpr int64_t kPanelsALook = 64;

// Packs columns first..end of the stripe as panels, where they lie among all of its panels.
template <class Scheme, class Source>
static void pack_columns(const Product& p, const Stripe& stripe, typename Scheme::Right* panels, int64_t first,
                         int64_t end) {
  static_assert(kColumnsAPack % kWidth<Scheme> == 0, "two tasks would pack one panel");
  const Source* source = static_cast<const Source*>(p.B.data) + (stripe.first + first) * p.B.stride[1];
  pack_right<Scheme>(panels + first * steps<Scheme>(p.rank), source, p.rank, end - first, p.B.stride[0], p.B.stride[1]);
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

inline constexpr int64_t kStripeBytes = 32 << 20;  // of packed columns: what scratch.h keeps from call to call

inline constexpr int64_t kMostRows = 2048;  // of a task

inline Product product_of(const Tensor& A, const Tensor& B) {
  return {strided<2>(A), strided<2>(B), A.size(0), B.size(1), A.size(1)};
}

// Rows of a task: `row_bytes` of each stay in a quarter of the L2 cache; every thread has four tasks where there are
// rows enough.
inline int64_t rows_a_task(int64_t rows, int64_t row_bytes) {
  const int64_t longest = std::clamp<int64_t>(caches().l2 / 4 / std::max<int64_t>(row_bytes, 1), 8, kMostRows);
  const int64_t shared = std::max<int64_t>(8, ceil_div(rows, 4 * torch::stable::get_num_threads()));
  return ceil_div(even_block(std::max<int64_t>(rows, 1), std::min(longest, shared)), 8) * 8;
}

// Packs all columns of a stripe, then calls task(stripe, first row, end) for all rows, at most so many at a time, and
// goes on to the next stripe.
template <class Kernels, class Arguments, class Task>
void stream(const Kernels& kernels, const Arguments& s, int64_t most_rows, const Task& task) {
  const Product& p = s.product;
  const int64_t column_bytes = kernels.column_bytes(p.rank);
  const int64_t rows_at_once = std::min(rows_a_task(p.rows, column_bytes), most_rows);
  const int64_t fit = kStripeBytes / std::max<int64_t>(column_bytes, 1) / kColumnsAPack;
  const int64_t across = std::min(std::max<int64_t>(fit, 1), ceil_div(p.columns, kColumnsAPack)) * kColumnsAPack;
  const HugeScratch packed(across * column_bytes);
  for (int64_t first = 0; first < p.columns; first += across) {
    const Stripe stripe{packed.data(), first, std::min(across, p.columns - first)};
    run_tasks(ceil_div(stripe.columns, kColumnsAPack), [&](int64_t i) {
      kernels.pack(s, stripe, i * kColumnsAPack, std::min((i + 1) * kColumnsAPack, stripe.columns));
    });
    run_tasks(ceil_div(p.rows, rows_at_once),
              [&](int64_t i) { task(stripe, i * rows_at_once, std::min((i + 1) * rows_at_once, p.rows)); });
  }
}

}  // namespace fc::cpu

#endif
