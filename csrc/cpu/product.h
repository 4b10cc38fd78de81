// A product A @ B that an op streams through without storing it: B is packed once for all threads, a stripe of columns
// at a time where the whole would be large, and a task takes some rows of A past all panels of the stripe.
#pragma once

#include <cstdint>

namespace fc::cpu {

struct Product {
  const void *A, *B;  // [N,r] and [r,M] of one type, any strides
  int64_t A_stride[2], B_stride[2];
  int64_t rows, columns, rank;  // N, M, r
};

struct Stripe {  // of columns, packed
  int64_t first, columns;
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include "tile.h"

namespace fc::cpu::FC_TIER {

inline constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A tile of products that waits to be consumed, and where it lies.
template <class T>
struct Tile {
  T* products;      // [kRows][kColumns], in the L1 cache
  int64_t block;    // of the task's rows
  int64_t panel;    // of the stripe
  int64_t columns;  // those past them are padding, exactly zero; 0 where no tile waits
};

// Panels first..end of the stripe, where they lie among all.
template <class Scheme, class Source>
static void pack_panels(const Product& p, const Stripe& stripe, typename Scheme::Right* panels, int64_t first,
                        int64_t end) {
  constexpr int64_t width = kWidth<Scheme>;
  const int64_t begin = first * width, columns = smaller(end * width, stripe.columns) - begin;
  const Source* source = static_cast<const Source*>(p.B) + (stripe.first + begin) * p.B_stride[1];
  pack_right<Scheme>(panels + begin * steps<Scheme>(p.rank), source, p.rank, columns, p.B_stride[0], p.B_stride[1]);
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include "../plan.h"
#include "dispatch.h"
#include "scratch.h"

namespace fc::cpu {

inline constexpr int64_t kStripeBytes = 32 << 20;
inline constexpr int64_t kColumnsAPack = 768;  // a multiple of every tier's panel

inline Product product_of(const Tensor& A, const Tensor& B) {
  STD_TORCH_CHECK(A.dim() == 2, "A has shape ", shape_of(A), ", expected [N, r]");
  STD_TORCH_CHECK(B.dim() == 2, "B has shape ", shape_of(B), ", expected [r, M]");
  STD_TORCH_CHECK(A.size(1) == B.size(0), "A has shape ", shape_of(A), " and B ", shape_of(B),
                  ": their inner dimensions r differ");
  STD_TORCH_CHECK(A.scalar_type() == B.scalar_type(), "A and B differ in dtype");
  return {.A = A.data_ptr(),
          .B = B.data_ptr(),
          .A_stride = {A.stride(0), A.stride(1)},
          .B_stride = {B.stride(0), B.stride(1)},
          .rows = A.size(0),
          .columns = B.size(1),
          .rank = A.size(1)};
}

// Rows of a task: `row_bytes` of each stay in the L2 cache; every thread has four tasks where there are rows enough.
inline int64_t rows_a_task(int64_t rows, int64_t row_bytes, int64_t threads) {
  const int64_t longest = std::clamp<int64_t>((256 << 10) / std::max<int64_t>(row_bytes, 1), 8, 2048);
  const int64_t even =
      even_block(std::max<int64_t>(rows, 1), std::min(longest, std::max<int64_t>(8, ceil_div(rows, 4 * threads))));
  return ceil_div(even, 8) * 8;
}

// pack(packed, stripe, first column, end) for all columns of a stripe, then task(packed, stripe, first row, end) for
// all rows; the stripes in order.
template <class Pack, class Task>
void stream(const Product& p, int64_t column_bytes, int64_t rows_at_once, const Pack& pack, const Task& task) {
  const int64_t fit = kStripeBytes / std::max<int64_t>(column_bytes, 1) / kColumnsAPack;
  const int64_t across = std::min(std::max<int64_t>(fit, 1), ceil_div(p.columns, kColumnsAPack)) * kColumnsAPack;
  const Shared packed(across * column_bytes);
  for (int64_t first = 0; first < p.columns; first += across) {
    const Stripe stripe{first, std::min(across, p.columns - first)};
    run_tasks(ceil_div(stripe.columns, kColumnsAPack), [&](int64_t i) {
      pack(packed.data(), stripe, i * kColumnsAPack, std::min((i + 1) * kColumnsAPack, stripe.columns));
    });
    run_tasks(ceil_div(p.rows, rows_at_once), [&](int64_t i) {
      task(packed.data(), stripe, i * rows_at_once, std::min((i + 1) * rows_at_once, p.rows));
    });
  }
}

}  // namespace fc::cpu

#endif
