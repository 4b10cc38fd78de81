// The logits base[t] + delta[p, t] @ basis[group[p]] of many ablations p, made a tile at a time and consumed by an op's
// epilogue before the next. Rows are (ablation, position) pairs, packed by group; the vocabulary passes in stripes of
// panels. A tile's products depend on nothing but its own row and column, so no result depends on threads or blocking.
#pragma once

#include <cstdint>

namespace fc::cpu {

struct Changes {
  const void *base, *delta, *basis;  // [T,V], [P,T,r], [G,r,V] of one type, any strides
  const void* outer;                 // [G,r,d], or null; basis is [1,d,V] then, and those of groups are outer @ basis
  int64_t base_stride[2], delta_stride[3], basis_stride[3], outer_stride[3];
  const int64_t* group;                               // [P]
  const int64_t* order;                               // [P]: ablations sorted by group
  int64_t pairs, positions, vocabulary, rank, depth;  // depth: d, or the rank
};

struct Block {
  int64_t first_pair, end_pair, first_position, end_position;  // pairs index `order`
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include "tile.h"

namespace fc::cpu::FC_TIER {

inline constexpr int64_t kPanelsAStripe = 4;  // packed together: long reads of base and basis
inline constexpr int64_t kStepsAPass = 192;   // of a product that makes a basis: what they read stays in the L1 cache

// A tile of products that waits to be consumed, and where it lies.
template <class T>
struct SweepTile {
  T* products;          // [kRows][kW]
  int64_t block;        // of rows; negative: none waits
  int64_t panel_row;    // row of the packed base that holds the panel's position 0
  int64_t first, here;  // its columns; those past `here` are padding
};

// What an epilogue may leave as it is. It has besides:
//   row(i, p, t): row i of the packed blocks is ablation p at position t; p is -1 where it only fills a block.
//   plain(columns): whether a stripe needs nothing of what consume<false> does and consume<true> leaves out.
//   consume<kPlain>(tile, i): row i of a tile. To be inlined: a call would spill the accumulators it runs beside.
struct Epilogue {
  // Where to leave the next tile; `next` stays in the L1 cache until the tile after the next.
  template <class T>
  T* place(T* next, int64_t, int64_t) const {
    return next;
  }
  void base_packed(int64_t, int64_t) {}  // (row, columns that are there) of the packed base
  void stripe_done(int64_t, int64_t) {}  // (first column, columns): its tiles are made and consumed
};

template <class Scheme, class Source>
struct Sweep {
  using T = typename Scheme::Accumulator;
  using Tile = SweepTile<T>;
  static constexpr int64_t kW = kWidth<Scheme>;
  static_assert(kW == kWidth<Ieee<T>>, "the panels of a basis are made in the accumulator's precision");

  const Changes& s;
  const Block& block;
  const int64_t window = block.end_position - block.first_position;
  const int64_t blocks = count_blocks();
  const int64_t depth = steps<Scheme>(s.rank);
  Buffer<typename Scheme::Left> left{blocks * kRows * depth};
  Buffer<typename Scheme::Right> panels{kPanelsAStripe * kW * depth};
  Buffer<T> base{kPanelsAStripe * kW * window};  // of a stripe, [panel][position][kW]
  const int64_t rows_of_outer = s.outer == nullptr ? 0 : (s.rank + kRows - 1) / kRows * kRows;
  Buffer<T> outers{count_groups() * rows_of_outer * s.depth};
  Buffer<T> wide{rows_of_outer == 0 ? 0 : kPanelsAStripe * kW * s.depth};  // a stripe of what outers multiply
  Buffer<T> made{rows_of_outer * kW};

  // Ablations first..end of `order` that share a group.
  int64_t group_end(int64_t first) const {
    int64_t end = first;
    while (end < block.end_pair && s.group[s.order[end]] == s.group[s.order[first]]) ++end;
    return end;
  }

  int64_t count_groups() const {
    int64_t total = 0;
    for (int64_t i = block.first_pair; i < block.end_pair; i = group_end(i)) ++total;
    return total;
  }

  int64_t count_blocks() const {
    int64_t total = 0;
    for (int64_t i = block.first_pair, end; i < block.end_pair; i = end) {
      end = group_end(i);
      total += ((end - i) * window + kRows - 1) / kRows;
    }
    return total;
  }

  template <class Op>
  void pack_rows(Op& op) {
    const auto* delta = static_cast<const Source*>(s.delta);
    std::memset(static_cast<void*>(left.data), 0, left.bytes());
    int64_t i = 0;
    for (int64_t first = block.first_pair, end; first < block.end_pair; first = end) {
      end = group_end(first);
      // Positions outermost: a row of clean logits stays in the L1 cache for all the ablations that start from it.
      for (int64_t t = block.first_position; t < block.end_position; ++t) {
        for (int64_t o = first; o < end; ++o, ++i) {
          const int64_t p = s.order[o];
          pack_left<Scheme>(left.data + i / kRows * kRows * depth, static_cast<int>(i % kRows),
                            delta + p * s.delta_stride[0] + t * s.delta_stride[1], s.rank, s.delta_stride[2]);
          op.row(i, p, t);
        }
      }
      for (; i % kRows != 0; ++i) op.row(i, -1, block.first_position);
    }
  }

  void pack_outers() {
    if (s.outer == nullptr) return;
    std::memset(static_cast<void*>(outers.data), 0, outers.bytes());
    T* out = outers.data;
    for (int64_t o = block.first_pair; o < block.end_pair; o = group_end(o), out += rows_of_outer * s.depth) {
      const auto* outer = static_cast<const Source*>(s.outer) + s.group[s.order[o]] * s.outer_stride[0];
      for (int64_t row = 0; row < s.rank; ++row)
        pack_left<Ieee<T>>(out + row / kRows * kRows * s.depth, static_cast<int>(row % kRows),
                           outer + row * s.outer_stride[1], s.depth, s.outer_stride[2]);
    }
  }

  // The panels of a stripe's basis: packed, or made of the stripe in `wide` and the packed outer of a group.
  void pack_basis(const Source* basis, int64_t group, int64_t first, int64_t columns) {
    if (s.outer == nullptr) {
      pack_right<Scheme>(panels.data, basis + first * s.basis_stride[2], s.rank, columns, s.basis_stride[1],
                         s.basis_stride[2]);
      return;
    }
    const T* outer = outers.data + group * rows_of_outer * s.depth;
    for (int64_t panel = 0; panel * kW < columns; ++panel) {
      for (int64_t k = 0; k < s.depth; k += kStepsAPass) {
        const int64_t steps = s.depth - k < kStepsAPass ? s.depth - k : kStepsAPass;
        for (int64_t row = 0; row < rows_of_outer; row += kRows) {
          T* tile = made.data + row * kW;
          multiply<Ieee<T>>(tile, outer + row * s.depth + k * kRows, wide.data + (panel * s.depth + k) * kW, steps,
                            [&](int i) { return k == 0 ? nullptr : tile + i * kW; });
        }
      }
      pack_right<Scheme>(panels.data + panel * kW * depth, made.data, s.rank,
                         columns - panel * kW < kW ? columns - panel * kW : kW, kW, 1);
    }
  }

  template <class Op>
  void pack_base(Op& op, int64_t first, int64_t columns) {
    const auto* source = static_cast<const Source*>(s.base) + first * s.base_stride[1];
    for (int64_t t = 0; t < window; ++t) {
      const Source* row = source + (block.first_position + t) * s.base_stride[0];
      for (int64_t panel = 0; panel * kW < columns; ++panel) {
        const int64_t here = columns - panel * kW < kW ? columns - panel * kW : kW;
        T* __restrict out = base.data + (panel * window + t) * kW;
        with_stride(s.base_stride[1], [&](auto stride) {
          for (int64_t j = 0; j < here; ++j) out[j] = widen(row[(panel * kW + j) * stride]);
        });
        for (int64_t j = here; j < kW; ++j) out[j] = 0;
        op.base_packed(panel * window + t, here);
      }
    }
  }

  // Block times panel, while the tile before is consumed. Not inlined: the accumulators need every register.
  template <bool kPlain, class Op>
  [[gnu::noinline]] void advance(Op& op, const Tile waiting, T* products, int64_t b, int64_t panel) {
    multiply<Scheme>(products, left.data + b * kRows * depth, panels.data + panel * kW * depth, depth, FromZero{},
                     [&](int i) __attribute__((always_inline)) {
                       if (waiting.block >= 0) op.template consume<kPlain>(waiting, i);
                     });
  }

  // The stripe from column `first` on of a matrix with such strides; nothing past the vocabulary.
  Ahead ahead(const Source* matrix, const int64_t* strides, int64_t count, int64_t first, int64_t times) const {
    const auto size = static_cast<int64_t>(sizeof(Source));
    const int64_t columns = s.vocabulary - first < kPanelsAStripe * kW ? s.vocabulary - first : kPanelsAStripe * kW;
    return {.row = reinterpret_cast<const char*>(matrix + first),
            .stride = strides[0] * size,
            .width = columns * size,
            .rows = columns > 0 && strides[1] == 1 ? count : 0,
            .times = times};
  }

  const Source* basis_of(int64_t o) const {
    const int64_t group = s.outer == nullptr ? s.group[s.order[o]] : 0;
    return static_cast<const Source*>(s.basis) + group * s.basis_stride[0];
  }

  template <class Op>
  void stripe(Op& op, int64_t first, int64_t columns) {
    alignas(64) T tiles[2][kRows * kW];
    Tile waiting{tiles[1], -1, 0, 0, 0};
    const auto* clean_rows = static_cast<const Source*>(s.base) + block.first_position * s.base_stride[0];
    const int64_t across = (columns + kW - 1) / kW;
    Ahead next_base = ahead(clean_rows, s.base_stride, window, first + columns, blocks * across);
    const bool plain = op.plain(columns);
    if (rows_of_outer > 0)
      pack_right<Ieee<T>>(wide.data, basis_of(0) + first * s.basis_stride[2], s.depth, columns, s.basis_stride[1],
                          s.basis_stride[2]);
    int64_t done = 0, group = 0;  // blocks of the groups before this one, and how many these are
    for (int64_t o = block.first_pair, end; o < block.end_pair; o = end, ++group) {
      end = group_end(o);
      pack_basis(basis_of(o), group, first, columns);
      const int64_t mine = ((end - o) * window + kRows - 1) / kRows;
      const bool last = end == block.end_pair;
      Ahead next_basis = ahead(basis_of(last ? block.first_pair : end), s.basis_stride + 1,
                               s.outer == nullptr ? s.rank : 0, last ? first + columns : first, mine * across);
      for (int64_t panel = 0; panel * kW < columns; ++panel) {
        const int64_t here = columns - panel * kW < kW ? columns - panel * kW : kW;
        for (int64_t b = done; b < done + mine; ++b) {
          next_base.fetch();
          next_basis.fetch();
          T* products = op.place(waiting.products == tiles[0] ? tiles[1] : tiles[0], b, panel);
          if (plain)
            advance<true>(op, waiting, products, b, panel);
          else
            advance<false>(op, waiting, products, b, panel);
          waiting = {products, b, panel * window - block.first_position, first + panel * kW, here};
        }
      }
      done += mine;
    }
    for (int i = 0; i < kRows && waiting.block >= 0; ++i) op.template consume<false>(waiting, i);
    op.stripe_done(first, columns);
  }

  template <class Op>
  void run(Op& op) {
    pack_rows(op);
    pack_outers();
    const int64_t width = kPanelsAStripe * kW;
    for (int64_t first = 0; first < s.vocabulary; first += width) {
      const int64_t columns = s.vocabulary - first < width ? s.vocabulary - first : width;
      pack_base(op, first, columns);
      stripe(op, first, columns);
    }
  }
};

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../plan.h"
#include "../sweep.h"
#include "dispatch.h"

namespace fc::cpu {

inline Tensor contiguous_as(const Tensor& x, torch::headeronly::ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

// Changes of tensors that have been checked, and what they point to.
struct OwnedChanges {
  Tensor group;
  std::vector<int64_t> order;
  Changes view;
};

inline OwnedChanges changes_of(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& group,
                               const std::optional<Tensor>& outer = std::nullopt) {
  const int64_t P = delta.size(0), G = (outer.has_value() ? *outer : basis).size(0);
  OwnedChanges out{torch::stable::contiguous(group), std::vector<int64_t>(static_cast<size_t>(P)), {}};
  const auto* groups = static_cast<const int64_t*>(out.group.data_ptr());
  for (int64_t p = 0; p < P; ++p)
    STD_TORCH_CHECK(groups[p] >= 0 && groups[p] < G, "group[", p, "] is ", groups[p], ", expected 0 to ", G - 1);
  std::iota(out.order.begin(), out.order.end(), int64_t{0});
  std::stable_sort(out.order.begin(), out.order.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });
  out.view = {.base = base.data_ptr(),
              .delta = delta.data_ptr(),
              .basis = basis.data_ptr(),
              .outer = nullptr,
              .base_stride = {base.stride(0), base.stride(1)},
              .delta_stride = {delta.stride(0), delta.stride(1), delta.stride(2)},
              .basis_stride = {basis.stride(0), basis.stride(1), basis.stride(2)},
              .outer_stride = {},
              .group = groups,
              .order = out.order.data(),
              .pairs = P,
              .positions = base.size(0),
              .vocabulary = base.size(1),
              .rank = delta.size(2),
              .depth = basis.size(1)};
  if (outer.has_value()) {
    out.view.outer = outer->data_ptr();
    for (int i = 0; i < 3; ++i) out.view.outer_stride[i] = outer->stride(i);
  }
  return out;
}

// task(block) for all blocks of a plan, on all threads.
template <class Task>
void run_blocks(const Changes& s, const TilePlan& plan, const Task& task) {
  const int64_t across = plan.tasks ? ceil_div(s.positions, plan.position_block) : 1;
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / across * plan.pair_block, t = i % across * plan.position_block;
      task(Block{p, std::min(p + plan.pair_block, s.pairs), t, std::min(t + plan.position_block, s.positions)});
    }
  });
}

}  // namespace fc::cpu

#endif
