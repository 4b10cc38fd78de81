// The logits base[t] + delta[p, t] @ basis[group[p]] of many ablations p, made a tile at a time and consumed by an op's
// epilogue before the next. Rows are (ablation, position) pairs, packed by group; the vocabulary passes in stripes of
// panels. A tile's products depend on nothing but its own row and column, so no result depends on threads or blocking.
#pragma once

#include "product.h"

namespace fc::cpu {

struct SweepInputs {     // tensors of one type
  Strided<2> base;       // [T,V]
  Strided<3> delta;      // [P,T,r]
  Strided<3> basis;      // [G,r,V], or [1,d,V] with outer: then a group's basis is outer @ basis
  Strided<3> outer;      // [G,r,d], or null
  const int64_t* group;  // [P]
  const int64_t* order;  // [P]: ablations sorted by group
  int64_t pairs, positions, vocabulary, rank, depth;  // P, T, V, r, and d (r without outer)
};

struct Block {                                                 // what one task sweeps
  int64_t first_pair, end_pair, first_position, end_position;  // rows; pairs index `order`
  int64_t part = 0, parts = 1;                                 // of the vocabulary: which, and of how many
};

// The vocabulary in even parts, whose sums are joined in order, so that no result depends on which tasks they were made
// by. They are a power of two, which most numbers of threads share evenly, of at most so many stripes each.
inline constexpr int64_t kStripesAPart = 64;
inline constexpr int64_t parts_of(int64_t stripes) {
  int64_t parts = 1;
  while (parts * kStripesAPart < stripes) parts *= 2;
  return parts;
}

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {

// Inner indices of outer @ basis that are multiplied together, so that a panel of them stays in the L1 cache: 36 KiB of
// 48 on CPUs with AVX-512, at most 18 KiB of 32 on others.
inline constexpr int64_t kStepsAPass = 192;
static_assert(kStepsAPass * kVectors * kVectorBytes <= (kVectorBytes == 64 ? 48 << 10 : kSmallestL1));

// Stripes that a row's lanes add up before they join its fp64 sums: 16 stripes of 4 panels of 3 vectors are 192 addends
// a lane, whose rounding stays below that of the products.
inline constexpr int64_t kStripesAFlush = 16;

// A tile of products, and where it lies: a block of rows by one or more panels, which follow each other.
template <class T>
struct SweepTile {
  T* products;             // [panels] of [kRows][kW]
  int64_t stride;          // between the products of two panels
  int64_t block;           // of rows
  int64_t panel, panels;   // of the stripe: the first, and how many
  int64_t first, columns;  // of the vocabulary; what lies past these columns is padding
  T longest;               // at least the norm of the longest column, if the op asks for it

  int64_t columns_of(int64_t i, int64_t width) const { return smaller(width, columns - i * width); }
};

// The rows of a group of ablations, and its panels.
template <class Scheme>
struct SweepGroup {
  const typename Scheme::Left* left;
  const typename Scheme::Right* panels;
  int64_t depth;    // of both, in steps
  int64_t first;    // row of the group's first ablation at the block's first position
  int64_t members;  // ablations, whose rows at position t of the block are first + t * members and the next
  int64_t pair;     // the first of them, in `order`
  int64_t token;    // the first of the panels
};

// What an op adds to the sweep. These it may leave as they are; besides, it has
//   row(i, p, t, length): row i of the packed blocks is ablation p at position t, and its norm is at most `length`. p
//     is -1 where the row only fills a block.
//   plain(columns): whether a stripe of so many columns asks for nothing special. consume<true> is for such stripes
//     alone, and has no code for the rest.
//   consume<kPlain>(tile, i): takes row i of a tile.
struct Epilogue {
  static constexpr bool kBounds = false;  // whether norms of rows and of columns are wanted
  // Where to leave the products of a tile; those in `given` last until the next tile is made.
  template <class T>
  T* place(T* given, int64_t /*block*/, int64_t panel) const {
    return given + panel % kTogether * kRows * kColumns<T>;
  }
  void base_packed(int64_t /*row*/, int64_t /*columns*/) {}  // a row of the packed base, and how many of it are there
  void stripe_packed(int64_t /*first*/, int64_t /*columns*/) {}  // all rows of these columns are
  template <class Group>
  void group_done(const Group&) {}                             // all tiles of a group in this stripe are consumed
  void stripe_done(int64_t /*first*/, int64_t /*columns*/) {}  // all tiles of these columns are
  void part_done() {}                                          // all stripes of a part of the vocabulary are
};

template <class Scheme, class Source>
struct Sweep {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static_assert(kW == kWidth<Ieee<T>>, "the panels of a basis are made in the accumulator's precision");

  const SweepInputs& s;
  const Block& block;
  const int64_t window = block.end_position - block.first_position;
  const int64_t blocks = count_blocks();
  const int64_t depth = steps<Scheme>(s.rank);
  Buffer<typename Scheme::Left> left{blocks * kRows * depth};
  Buffer<typename Scheme::Right> panels{kPanelsAStripe * kW * depth};
  Buffer<T> base{kPanelsAStripe * kW * window};  // of a stripe, [panel][position][kW]
  const int64_t rows_of_outer = s.outer.data == nullptr ? 0 : blocks_of(s.rank) * kRows;
  Buffer<T> outers{count_groups() * rows_of_outer * s.depth};
  Buffer<T> wide{rows_of_outer == 0 ? 0 : kPanelsAStripe * kW * s.depth};  // a stripe of the shared basis [d,V]
  Buffer<T> basis_panel{rows_of_outer * kW};                               // a panel of outer @ basis
  T longest[kPanelsAStripe / kTogether] = {};  // at least the norm of the longest column of each tile

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
      total += blocks_of((end - i) * window);
    }
    return total;
  }

  template <class Op>
  void pack_deltas(Op& op) {
    const auto* delta = static_cast<const Source*>(s.delta.data);
    std::memset(static_cast<void*>(left.data), 0, left.bytes());
    int64_t i = 0;
    for (int64_t first = block.first_pair, end; first < block.end_pair; first = end) {
      end = group_end(first);
      // Positions outermost: a row of clean logits stays in the L1 cache for all the ablations that start from it.
      for (int64_t t = block.first_position; t < block.end_position; ++t) {
        for (int64_t o = first; o < end; ++o, ++i) {
          const int64_t p = s.order[o];
          const Source* row = delta + p * s.delta.stride[0] + t * s.delta.stride[1];
          pack_left<Scheme>(left.data, i, row, s.rank, s.delta.stride[2]);
          op.row(i, p, t, Op::kBounds ? length(row) : T(0));
        }
      }
      for (; i % kRows != 0; ++i) op.row(i, -1, block.first_position, T(0));
    }
  }

  // At least the norm of a row of delta, of its rounded entries too.
  T length(const Source* row) const {
    const int64_t stride = s.delta.stride[2];
    const auto square = [&](int64_t k) { return static_cast<double>(widen(row[k * stride])) * widen(row[k * stride]); };
    double sums[4] = {1e-34};  // apart: no sum waits for another
    int64_t k = 0;
    for (; k + 4 <= s.rank; k += 4)
      for (int64_t j = 0; j < 4; ++j) sums[j] += square(k + j);
    for (; k < s.rank; ++k) sums[0] += square(k);
    const double squares = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return static_cast<T>(std::sqrt(squares) * (Scheme::kDepth > 1 ? 1.004 : 1.00001));
  }

  void pack_outers() {
    if (s.outer.data == nullptr) return;
    T* out = outers.data;
    for (int64_t o = block.first_pair; o < block.end_pair; o = group_end(o), out += rows_of_outer * s.depth)
      pack_rows<Ieee<T>>(out, static_cast<const Source*>(s.outer.data) + s.group[s.order[o]] * s.outer.stride[0],
                         s.rank, s.depth, s.outer.stride[1], s.outer.stride[2]);
  }

  // Packs the panels of a stripe of a group's basis, or makes them from the stripe in `wide` and the group's outer.
  void pack_basis(const Source* basis, int64_t group, int64_t first, int64_t columns) {
    if (s.outer.data == nullptr) {
      pack_right<Scheme>(panels.data, basis + first * s.basis.stride[2], s.rank, columns, s.basis.stride[1],
                         s.basis.stride[2]);
      return;
    }
    const T* outer = outers.data + group * rows_of_outer * s.depth;
    for (int64_t panel = 0; panel * kW < columns; ++panel) {
      for (int64_t k = 0; k < s.depth; k += kStepsAPass) {
        const int64_t count = smaller(kStepsAPass, s.depth - k);
        for (int64_t row = 0; row < rows_of_outer; row += kRows) {
          T* tile = basis_panel.data + row * kW;
          multiply<Ieee<T>>(tile, outer + row * s.depth + k * kRows, wide.data + (panel * s.depth + k) * kW, count,
                            [&](int i) { return k == 0 ? nullptr : tile + i * kW; });
        }
      }
      pack_right<Scheme>(panels.data + panel * kW * depth, basis_panel.data, s.rank, smaller(kW, columns - panel * kW),
                         kW, 1);
    }
  }

  template <class Op>
  void pack_base(Op& op, int64_t first, int64_t columns) {
    const auto* source = static_cast<const Source*>(s.base.data) + first * s.base.stride[1];
    for (int64_t t = 0; t < window; ++t) {
      const Source* row = source + (block.first_position + t) * s.base.stride[0];
      for (int64_t panel = 0; panel * kW < columns; ++panel) {
        const int64_t here = smaller(kW, columns - panel * kW);
        T* __restrict out = base.data + (panel * window + t) * kW;
        with_stride(s.base.stride[1], [&](auto stride) {
          for (int64_t j = 0; j < here; ++j) out[j] = widen(row[(panel * kW + j) * stride]);
        });
        for (int64_t j = here; j < kW; ++j) out[j] = 0;
        op.base_packed(panel * window + t, here);
      }
    }
  }

  // Prefetches the stripe from column `first` on of a matrix of `rows` rows, over so many tiles; nothing where the
  // vocabulary has ended or its columns lie apart.
  Prefetch stripe_of(const Source* matrix, const int64_t* strides, int64_t rows, int64_t first, int64_t tiles) const {
    const auto size = static_cast<int64_t>(sizeof(Source));
    const int64_t columns = smaller(kPanelsAStripe * kW, s.vocabulary - first);
    return {.row = reinterpret_cast<const char*>(matrix + first),
            .stride = strides[0] * size,
            .width = columns * size,
            .rows = columns > 0 && strides[1] == 1 ? rows : 0,
            .calls = tiles};
  }

  const Source* basis_of(int64_t o) const {
    const int64_t group = s.outer.data == nullptr ? s.group[s.order[o]] : 0;
    return static_cast<const Source*>(s.basis.data) + group * s.basis.stride[0];
  }

  // A token's column of the basis of the o-th ablation in `order`, [r], of factors as they were given.
  void read_column(double* out, int64_t o, int64_t token) const {
    const Source* column = basis_of(o) + token * s.basis.stride[2];
    if (s.outer.data == nullptr) {
      for (int64_t k = 0; k < s.rank; ++k) out[k] = widen(column[k * s.basis.stride[1]]);
      return;
    }
    const Buffer<double> through{s.depth};
    for (int64_t i = 0; i < s.depth; ++i) through.data[i] = widen(column[i * s.basis.stride[1]]);
    for (int64_t k = 0; k < s.rank; ++k)
      out[k] = dot(s.outer.template at<Source>(s.group[s.order[o]]) + k * s.outer.stride[1], s.outer.stride[2],
                   through.data, s.depth);
  }

  // The product of such a column with the row of the o-th ablation at a position of the block.
  double product_given(int64_t o, int64_t position, const double* column) const {
    const Source* row = s.delta.template at<Source>(s.order[o]) + (block.first_position + position) * s.delta.stride[1];
    return dot(row, s.delta.stride[2], column, s.rank);
  }

  static double dot(const Source* a, int64_t stride, const double* b, int64_t count) {
    double sums[8] = {};  // apart: no sum waits for another
    with_stride(stride, [&](auto step) {
      for (int64_t i = 0; i < count; i += 8)
        for (int64_t j = 0; j < smaller(8, count - i); ++j) sums[j] += widen(a[(i + j) * step]) * b[i + j];
    });
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  // The op as the walk over a stripe sees it.
  template <bool kPlain, class Op>
  struct StripeOp {
    using Tile = SweepTile<T>;
    Sweep& sweep;
    Op& op;
    const int64_t first, columns;
    Prefetch next_base, next_basis{};

    Tile next(T* products, int64_t block, int64_t panel) {
      next_base.fetch();
      next_basis.fetch();
      const int64_t at = panel * kW, count = smaller(kTogether, panels_of<Scheme>(columns) - panel);
      T* const here = op.place(products, block, panel);
      return {.products = here,
              .stride = op.place(products, block, panel + (count > 1 ? 1 : 0)) - here,
              .block = block,
              .panel = panel,
              .panels = count,
              .first = first + at,
              .columns = smaller(count * kW, columns - at),
              .longest = sweep.longest[panel / kTogether]};
    }
    T* more(const Tile& tile, int64_t i) const { return tile.products + i * tile.stride; }
    [[gnu::always_inline]] void consume(const Tile& tile, int i) { op.template consume<kPlain>(tile, i); }
  };

  template <bool kPlain, class Op>
  void stripe(Op& op, int64_t first, int64_t columns) {
    const auto* clean_rows = static_cast<const Source*>(s.base.data) + block.first_position * s.base.stride[0];
    const int64_t across = panels_of<Scheme>(columns);
    StripeOp<kPlain, Op> seen{*this, op, first, columns,
                              stripe_of(clean_rows, s.base.stride, window, first + columns, blocks * tiles_of(across))};
    Walk<Scheme, StripeOp<kPlain, Op>> walk(seen, left.data, panels.data, depth);
    if (rows_of_outer > 0)
      pack_right<Ieee<T>>(wide.data, basis_of(0) + first * s.basis.stride[2], s.depth, columns, s.basis.stride[1],
                          s.basis.stride[2]);
    int64_t done = 0, group = 0;  // blocks of the groups before this one, and how many these are
    for (int64_t o = block.first_pair, end; o < block.end_pair; o = end, ++group) {
      end = group_end(o);
      pack_basis(basis_of(o), group, first, columns);
      for (int64_t panel = 0; Op::kBounds && panel < across; ++panel) {
        const T norm = longest_column<Scheme>(panels.data + panel * kW * depth, depth);
        T& most = longest[panel / kTogether];
        if (panel % kTogether == 0 || norm > most) most = norm;
      }
      const int64_t mine = blocks_of((end - o) * window);
      const bool last = end == block.end_pair;
      seen.next_basis =
          stripe_of(basis_of(last ? block.first_pair : end), s.basis.stride + 1, s.outer.data == nullptr ? s.rank : 0,
                    last ? first + columns : first, mine * tiles_of(across));
      for (int64_t panel = 0; panel < across; panel += kTogether)
        walk.panel(panel, done, done + mine, smaller(kTogether, across - panel));
      op.group_done(SweepGroup<Scheme>{left.data, panels.data, depth, done * kRows, end - o, o, first});
      done += mine;
    }
    op.stripe_done(first, columns);
  }

  template <class Op>
  void run(Op& op) {
    pack_deltas(op);
    pack_outers();
    const int64_t width = kPanelsAStripe * kW, stripes = (s.vocabulary + width - 1) / width, parts = parts_of(stripes);
    const bool whole = block.parts == 1;
    for (int64_t part = whole ? 0 : block.part; part < (whole ? parts : block.part + 1); ++part) {
      const int64_t end = smaller(stripes * (part + 1) / parts * width, s.vocabulary);
      for (int64_t first = stripes * part / parts * width; first < end; first += width) {
        look_for_interrupt();
        const int64_t columns = smaller(width, s.vocabulary - first);
        pack_base(op, first, columns);
        op.stripe_packed(first, columns);
        if (op.plain(columns))
          stripe<true>(op, first, columns);
        else
          stripe<false>(op, first, columns);
      }
      op.part_done();
    }
  }
};

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <numeric>

namespace fc::cpu {

// The inputs of a sweep, checked before, and what they point to.
struct OwnedInputs {
  Tensor group;
  std::vector<int64_t> order;
  SweepInputs view;
};

inline OwnedInputs inputs_of(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& group,
                             const std::optional<Tensor>& outer = std::nullopt) {
  const int64_t P = delta.size(0), G = (outer.has_value() ? *outer : basis).size(0);
  OwnedInputs out{torch::stable::contiguous(group), std::vector<int64_t>(static_cast<size_t>(P)), {}};
  const auto* groups = data_of<const int64_t>(out.group);
  check_indices("group", groups, P, G);
  std::iota(out.order.begin(), out.order.end(), int64_t{0});
  std::stable_sort(out.order.begin(), out.order.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });
  const Strided<3> outers = outer.has_value() ? strided<3>(*outer) : Strided<3>{};
  out.view = {strided<2>(base), strided<3>(delta), strided<3>(basis), outers,       groups, out.order.data(), P,
              base.size(0),     base.size(1),      delta.size(2),     basis.size(1)};
  return out;
}

// task(arguments, block) for all blocks of a plan, and for each part of the vocabulary where there are several, on all
// threads.
template <class Arguments>
void run_blocks(const Arguments& arguments, void (*task)(const Arguments&, const Block&), const TilePlan& plan,
                int64_t parts = 1) {
  const SweepInputs& s = arguments.inputs;
  const int64_t across = plan.tasks > 0 ? ceil_div(s.positions, plan.position_block) : 1;
  run_tasks(plan.tasks * parts, [&](int64_t i) {
    const int64_t block = i / parts, p = block / across * plan.pair_block, t = block % across * plan.position_block;
    task(arguments, {p, std::min(p + plan.pair_block, s.pairs), t, std::min(t + plan.position_block, s.positions),
                     i % parts, parts});
  });
}

}  // namespace fc::cpu

#endif
