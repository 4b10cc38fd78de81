// pair_norms on the CPU, by two routes.
// Products: the epilogue sums the squares of each left[i] @ right[j], so that no product reaches memory.
// Grams: ||left[i] @ right[j]||^2 is the inner product of left[i]^T left[i] and right[j] right[j]^T. Both are symmetric
// [d,d], so for d < r s it costs less; tiles of them are made and consumed where they are needed, never stored whole.
// Sums run in an order that depends on the shapes alone: results do not depend on threads.
#include <cstdint>

#include "dispatch.h"

namespace fc::cpu {

struct PairArguments {
  const void *left, *right;  // [N,r,d] and [M,d,s] of one type, any strides
  int64_t left_stride[3], right_stride[3];
  const int64_t* before;                      // [M] or null: only pairs with i < before[j]
  int64_t lefts, rights, rank, depth, width;  // N, M, r, d, s
};

struct PairBlock {
  int64_t first_left, end_left, first_right, end_right;
};

// Grams are cut into units, one strip of rows against one panel of columns: units first..end.
struct GramUnits {
  int64_t first, end;
};

// Sums of squares are fp64: `products` writes its block of [N,M], `grams` adds to all of it.
struct PairKernels {
  int64_t (*packed_bytes)(const PairArguments&);  // of one left factor
  void (*pack)(const PairArguments&, void* packed, int64_t left);
  void (*products)(const PairArguments&, const void* packed, const PairBlock&, double* squares);
  int64_t (*gram_bytes)(const PairArguments&);
  void (*gram_pack)(const PairArguments&, void* packed, int64_t factor);
  int64_t (*gram_units)(const PairArguments&);
  void (*grams)(const PairArguments&, const void* packed, const GramUnits&, double* squares);
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include "tile.h"

namespace fc::cpu::FC_TIER {
namespace {

constexpr int64_t kStepsAChunk = 256;  // of the inner dimension: a chunk of a panel stays in the L1 cache
constexpr int64_t kBlocksAUnit = 6;    // row blocks whose Gram tiles are consumed together
constexpr int64_t kRightsAGroup = 48;  // whose tiles of a unit stay in the L2 cache

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

template <class Scheme, class Source>
struct Pairs {
  using T = typename Scheme::Accumulator;
  using Left = typename Scheme::Left;
  using Right = typename Scheme::Right;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int64_t kTile = kRows * kW;

  static int64_t packed_size(const PairArguments& p) { return blocks_of(p.rank) * kRows * steps<Scheme>(p.depth); }
  static int64_t packed_bytes(const PairArguments& p) { return packed_size(p) * static_cast<int64_t>(sizeof(Left)); }
  static bool wanted(const PairArguments& p, int64_t i, int64_t j) { return p.before == nullptr || i < p.before[j]; }
  static const Source* left(const PairArguments& p, int64_t i) {
    return static_cast<const Source*>(p.left) + i * p.left_stride[0];
  }
  static const Source* right(const PairArguments& p, int64_t j) {
    return static_cast<const Source*>(p.right) + j * p.right_stride[0];
  }

  static void pack(const PairArguments& p, void* packed, int64_t i) {
    Left* head = static_cast<Left*>(packed) + i * packed_size(p);
    std::memset(static_cast<void*>(head), 0, static_cast<size_t>(packed_bytes(p)));
    for (int64_t row = 0; row < p.rank; ++row)
      pack_left<Scheme>(head + row / kRows * kRows * steps<Scheme>(p.depth), static_cast<int>(row % kRows),
                        left(p, i) + row * p.left_stride[1], p.depth, p.left_stride[2]);
  }

  // Right factors first..end side by side as panels [panel][step][kW]: a factor may end in the middle of one.
  static void pack_rights(const PairArguments& p, Right* panels, int64_t first, int64_t end) {
    const int64_t depth = steps<Scheme>(p.depth), columns = (end - first) * p.width;
    const int64_t padded = (columns + kW - 1) / kW * kW;
    for (int64_t c = 0; c < padded; ++c) {
      Right* out = panels + c / kW * depth * kW + c % kW;
      if (c >= columns) {
        for (int64_t step = 0; step < depth; ++step) out[step * kW] = 0;
        continue;
      }
      const Source* column = right(p, first + c / p.width) + c % p.width * p.right_stride[2];
      for (int64_t step = 0; step < depth; ++step)
        out[step * kW] = Scheme::right(column + step * Scheme::kDepth * p.right_stride[1], p.right_stride[1],
                                       p.depth - step * Scheme::kDepth);
    }
  }

  static void products(const PairArguments& p, const void* packed, const PairBlock& block, double* squares) {
    const int64_t depth = steps<Scheme>(p.depth), blocks = blocks_of(p.rank);
    const int64_t columns = (block.end_right - block.first_right) * p.width, panels = (columns + kW - 1) / kW;
    Buffer<Right> rights{panels * kW * depth};
    pack_rights(p, rights.data, block.first_right, block.end_right);
    Buffer<T> tiles{panels * blocks * kTile};
    const auto right_at = [&](int64_t column) { return block.first_right + smaller(column, columns - 1) / p.width; };

    for (int64_t i = block.first_left; i < block.end_left; ++i) {
      const Left* head = static_cast<const Left*>(packed) + i * packed_size(p);
      const auto skipped = [&](int64_t panel) {
        bool any = false;
        for (int64_t j = right_at(panel * kW); j <= right_at(panel * kW + kW - 1); ++j) any |= wanted(p, i, j);
        return !any;
      };
      for (int64_t k = 0; k < depth; k += kStepsAChunk) {
        const int64_t count = smaller(kStepsAChunk, depth - k);
        for (int64_t panel = 0; panel < panels; ++panel) {
          if (skipped(panel)) continue;
          for (int64_t b = 0; b < blocks; ++b) {
            T* tile = tiles.data + (panel * blocks + b) * kTile;
            multiply<Scheme>(tile, head + (b * depth + k) * kRows, rights.data + (panel * depth + k) * kW, count,
                             [&](int row) { return k == 0 ? nullptr : tile + row * kW; });
          }
        }
      }
      double* out = squares + i * p.rights;
      for (int64_t j = block.first_right; j < block.end_right; ++j) out[j] = 0;
      for (int64_t panel = 0; panel < panels; ++panel) {
        if (skipped(panel)) continue;
        alignas(64) T sums[kW];
        sum_columns(tiles.data + panel * blocks * kTile, blocks, sums);
        for (int64_t c = panel * kW; c < smaller(columns, panel * kW + kW); ++c) {
          const int64_t j = block.first_right + c / p.width;
          if (wanted(p, i, j)) out[j] += static_cast<double>(sums[c - panel * kW]);
        }
      }
    }
  }

  // Squares summed down each column, kRows at a time, so that no accumulator takes more than r / kRows addends.
  static void sum_columns(const T* tiles, int64_t blocks, T* sums) {
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> total{};
      for (int64_t b = 0; b < blocks; ++b) {
        Vec<T> rows{};
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> x = load(tiles + b * kTile + i * kW + v * kLanes<T>);
          rows += x * x;
        }
        total += rows;
      }
      store(sums + v * kLanes<T>, total);
    }
  }

  // One side of the Gram route: `count` factors as rank rows of d entries, packed as panels [factor][panel][k][kW].
  struct Side {
    const T* panels;
    int64_t count, rank, depth;
    int64_t panel_size() const { return rank * kW; }
    const T* panel(int64_t i, int64_t index) const { return panels + (i * panels_of(depth) + index) * panel_size(); }
  };
  static int64_t panels_of(int64_t depth) { return (depth + kW - 1) / kW; }
  static int64_t gram_bytes(const PairArguments& p) {
    return (p.lefts * p.rank + p.rights * p.width) * panels_of(p.depth) * kW * static_cast<int64_t>(sizeof(T));
  }
  static Side left_side(const PairArguments& p, const void* packed) {
    return {static_cast<const T*>(packed), p.lefts, p.rank, p.depth};
  }
  static Side right_side(const PairArguments& p, const void* packed) {
    const Side lefts = left_side(p, packed);
    return {lefts.panel(p.lefts, 0), p.rights, p.width, p.depth};
  }

  // Packs factor i of the lefts and, after them, the rights.
  static void gram_pack(const PairArguments& p, void* packed, int64_t i) {
    const bool is_left = i < p.lefts;
    const Side side = is_left ? left_side(p, packed) : right_side(p, packed);
    const Source* x = is_left ? left(p, i) : right(p, i - p.lefts);
    const int64_t row = is_left ? p.left_stride[1] : p.right_stride[2];
    const int64_t entry = is_left ? p.left_stride[2] : p.right_stride[1];
    T* out = const_cast<T*>(side.panel(is_left ? i : i - p.lefts, 0));
    for (int64_t panel = 0; panel < panels_of(p.depth); ++panel, x += kW * entry)
      for (int64_t k = 0; k < side.rank; ++k, out += kW) {
        const Source* from = x + k * row;
        if (entry == 1 && panel * kW + kW <= p.depth) {  // vectors at a time
          for (int64_t c = 0; c < kW; ++c) out[c] = widen(from[c]);
        } else {
          for (int64_t c = 0; c < kW; ++c) out[c] = panel * kW + c < p.depth ? widen(from[c * entry]) : T(0);
        }
      }
  }

  // Units of a panel start at the first row block that reaches down to its diagonal.
  static int64_t first_block(int64_t panel) { return panel * kW / kRows; }
  static int64_t units_of_panel(int64_t depth, int64_t panel) {
    return (blocks_of(depth) - first_block(panel) + kBlocksAUnit - 1) / kBlocksAUnit;
  }
  static int64_t gram_units(const PairArguments& p) {
    int64_t units = 0;
    for (int64_t panel = 0; panel * kW < p.depth; ++panel) units += units_of_panel(p.depth, panel);
    return units;
  }

  // Row block b of factor i, [k][kRows], out of its panels; the last block may end past them.
  static void gram_block(const Side& side, int64_t i, int64_t b, T* block) {
    const int64_t panel = b * kRows / kW, offset = b * kRows % kW;
    const T* from = side.panel(i, panel) + offset;
    if (offset + kRows <= kW) {
      for (int64_t k = 0; k < side.rank; ++k) std::memcpy(block + k * kRows, from + k * kW, kRows * sizeof(T));
      return;
    }
    const bool last = panel + 1 == panels_of(side.depth);
    for (int64_t k = 0; k < side.rank; ++k)
      for (int64_t row = 0; row < kRows; ++row) {
        const bool here = offset + row < kW;
        block[k * kRows + row] = here   ? from[k * kW + row]
                                 : last ? T(0)
                                        : side.panel(i, panel + 1)[k * kW + offset + row - kW];
      }
  }

  // Gram tiles of one unit for every factor of a side, [i][entry]. Entries above the diagonal are 0 and those below it
  // count twice if `weighted`.
  template <bool weighted>
  static void gram_tiles(const Side& side, int64_t panel, int64_t first, int64_t blocks, T* block, T* out) {
    for (int64_t i = 0; i < side.count; ++i)
      for (int64_t b = first; b < first + blocks; ++b) {
        T* tile = out + (i * kBlocksAUnit + b - first) * kTile;
        gram_block(side, i, b, block);
        multiply<Ieee<T>>(tile, block, side.panel(i, panel), side.rank, [](int) { return nullptr; });
        if (!weighted) continue;
        const int64_t below = b * kRows - panel * kW;  // columns left of the diagonal in the first row
        if (below < kW) {
          for (int64_t row = 0; row < kRows; ++row)
            for (int64_t c = 0; c < kW; ++c) tile[row * kW + c] *= c < below + row ? 2 : c == below + row;
        } else {
          for (int64_t e = 0; e < kTile; ++e) tile[e] *= 2;
        }
      }
  }

  // dots[i][j] = left row i . right row j over `count` vectors, rows `stride` apart. Tiles come out of multiply() with
  // the entries of one factor side by side; to feed them to it again they would have to be scattered over lanes of the
  // packed layout first. What that would cost beside this has not been measured by itself.
  static void inner_products(const T* left, const T* right, int64_t stride, int64_t count, T (&dots)[kRows][kVectors]) {
    Vec<T> c[kRows][kVectors] = {};
    for (int64_t k = 0; k < count; ++k, left += kLanes<T>, right += kLanes<T>) {
      Vec<T> b[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) b[j] = load(right + j * stride);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> a = load(left + i * stride);
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) c[i][j] += a * b[j];
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) dots[i][j] = sum<T>(c[i][j]);
  }

  static void grams(const PairArguments& p, const void* packed, const GramUnits& units, double* squares) {
    const Side lefts = left_side(p, packed), rights = right_side(p, packed);
    constexpr int64_t entries = kBlocksAUnit * kTile;
    Buffer<T> block{(p.rank > p.width ? p.rank : p.width) * kRows};
    Buffer<T> left_tiles{(p.lefts + kRows) * entries}, right_tiles{(p.rights + kVectors) * entries};
    for (int64_t e = 0; e < kRows * entries; ++e) left_tiles.data[p.lefts * entries + e] = 0;
    for (int64_t e = 0; e < kVectors * entries; ++e) right_tiles.data[p.rights * entries + e] = 0;

    int64_t unit = 0;
    for (int64_t panel = 0; panel * kW < p.depth; ++panel)
      for (int64_t u = 0; u < units_of_panel(p.depth, panel); ++u, ++unit) {
        if (unit < units.first || unit >= units.end) continue;
        const int64_t first = first_block(panel) + u * kBlocksAUnit;
        const int64_t blocks = smaller(kBlocksAUnit, blocks_of(p.depth) - first);
        gram_tiles<true>(lefts, panel, first, blocks, block.data, left_tiles.data);
        gram_tiles<false>(rights, panel, first, blocks, block.data, right_tiles.data);
        for (int64_t j = 0; j < p.rights; j += kRightsAGroup)
          for (int64_t i = 0; i < p.lefts; i += kRows)
            for (int64_t c = j; c < smaller(j + kRightsAGroup, p.rights); c += kVectors)
              add_inner_products(p, i, c, left_tiles.data + i * entries, right_tiles.data + c * entries, blocks,
                                 squares);
      }
  }

  static void add_inner_products(const PairArguments& p, int64_t i, int64_t j, const T* left, const T* right,
                                 int64_t blocks, double* squares) {
    const int64_t end_left = smaller(i + kRows, p.lefts), end_right = smaller(j + kVectors, p.rights);
    bool any = false;
    for (int64_t c = j; c < end_right; ++c) any |= wanted(p, i, c);
    if (!any) return;
    T dots[kRows][kVectors];
    inner_products(left, right, kBlocksAUnit * kTile, blocks * kTile / kLanes<T>, dots);
    for (int64_t row = i; row < end_left; ++row)
      for (int64_t c = j; c < end_right; ++c) squares[row * p.rights + c] += static_cast<double>(dots[row - i][c - j]);
  }
};

template <class Scheme, class Source>
const PairKernels* kernels() {
  using P = Pairs<Scheme, Source>;
  static constexpr PairKernels table{P::packed_bytes, P::pack,       P::products, P::gram_bytes,
                                     P::gram_pack,    P::gram_units, P::grams};
  return &table;
}

}  // namespace

// Null where this tier has no such instruction.
const PairKernels* pair_kernels(Kind kind) {
  switch (kind) {
    case Kind::fp32:
      return kernels<Ieee<float>, float>();
    case Kind::fp64:
      return kernels<Ieee<double>, double>();
    case Kind::bf16_inputs:
      return kernels<Ieee<float>, BFloat16>();
#if defined(__AVX512BF16__)
    case Kind::fp32_by_bf16:
      return kernels<Bf16Dot, float>();
    case Kind::bf16_by_bf16:
      return kernels<Bf16Dot, BFloat16>();
#endif
    default:
      return nullptr;
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../check.h"
#include "../plan.h"

namespace fc::cpu {

FC_TIERS(const PairKernels*, pair_kernels, Kind)

namespace {

using torch::headeronly::ScalarType;

// Right factors packed together: the count below 512 columns that fills its panels of 48 best.
int64_t rights_at_once(int64_t width) {
  int64_t best = 1;
  const auto waste = [&](int64_t n) { return static_cast<double>(ceil_div(n * width, 48) * 48) / (n * width); };
  for (int64_t n = 2; n * width <= 512; ++n)
    if (waste(n) < waste(best) - 1e-9) best = n;
  return best;
}

void run_products(const PairArguments& p, const PairKernels& kernels, double* squares) {
  const int64_t threads = torch::stable::get_num_threads();
  const Shared packed(p.lefts * kernels.packed_bytes(p));
  run_tasks(p.lefts, [&](int64_t i) { kernels.pack(p, packed.data(), i); });

  const int64_t across = rights_at_once(p.width), stripes = ceil_div(p.rights, across);
  const int64_t groups = std::min(p.lefts, ceil_div(4 * threads, stripes));
  const int64_t down = ceil_div(p.lefts, groups);
  run_tasks(stripes * groups, [&](int64_t task) {
    const int64_t i = task % groups * down, j = task / groups * across;
    if (i < p.lefts)
      kernels.products(p, packed.data(), {i, std::min(i + down, p.lefts), j, std::min(j + across, p.rights)}, squares);
  });
}

// Partial sums of as many groups of units as fit in 64 MiB, at most 32, added in order.
void run_grams(const PairArguments& p, const PairKernels& kernels, double* squares) {
  const int64_t pairs = p.lefts * p.rights, units = kernels.gram_units(p);
  const int64_t groups =
      std::clamp<int64_t>((int64_t{8} << 20) / std::max<int64_t>(pairs, 1), 1, std::min<int64_t>(32, units));
  const Shared packed(kernels.gram_bytes(p));
  run_tasks(p.lefts + p.rights, [&](int64_t i) { kernels.gram_pack(p, packed.data(), i); });
  std::vector<double> partial(static_cast<size_t>(groups * pairs), 0.0);
  run_tasks(groups, [&](int64_t g) {
    kernels.grams(p, packed.data(), {units * g / groups, units * (g + 1) / groups}, partial.data() + g * pairs);
  });
  for (int64_t n = 0; n < pairs; ++n) {
    squares[n] = 0;
    if (p.before != nullptr && n / p.rights >= p.before[n % p.rights]) continue;
    for (int64_t g = 0; g < groups; ++g) squares[n] += partial[static_cast<size_t>(g * pairs + n)];
  }
}

Tensor pair_norms(const Tensor& left, const Tensor& right, const std::optional<Tensor>& before,
                  const std::string& precision, bool gram) {
  STD_TORCH_CHECK(left.dim() == 3, "left has shape ", shape_of(left), ", expected [N, r, d]");
  STD_TORCH_CHECK(right.dim() == 3, "right has shape ", shape_of(right), ", expected [M, d, s]");
  const int64_t N = left.size(0), r = left.size(1), d = left.size(2), M = right.size(0), s = right.size(2);
  FC_CHECK_SHAPE(right, (Shape{M, d, s}));
  STD_TORCH_CHECK(left.scalar_type() == right.scalar_type(), "left and right differ in dtype");
  std::optional<Tensor> before_c;
  if (before.has_value()) {
    FC_CHECK_SHAPE(*before, (Shape{M}));
    STD_TORCH_CHECK(before->scalar_type() == ScalarType::Long, "before must be int64");
    before_c = torch::stable::contiguous(*before);
  }
  const PairKernels* found = pick_pair_kernels(kind_of("left", left.scalar_type(), precision));
  check_instructions(found != nullptr, "precision");
  const PairKernels& kernels = *found;
  STD_TORCH_CHECK(!gram || precision == "ieee", "precision='bf16' has no Gram route: it would be wrong where ",
                  "scores are small");

  Tensor squares = torch::stable::new_empty(left, {N, M}, ScalarType::Double);
  auto* out = static_cast<double*>(squares.data_ptr());
  const PairArguments arguments{
      .left = left.data_ptr(),
      .right = right.data_ptr(),
      .left_stride = {left.stride(0), left.stride(1), left.stride(2)},
      .right_stride = {right.stride(0), right.stride(1), right.stride(2)},
      .before = before_c.has_value() ? static_cast<const int64_t*>(before_c->data_ptr()) : nullptr,
      .lefts = N,
      .rights = M,
      .rank = r,
      .depth = d,
      .width = s};
  if (N * M == 0 || r == 0 || d == 0 || s == 0) {
    std::fill(out, out + N * M, 0.0);
  } else if (gram) {
    run_grams(arguments, kernels, out);
  } else {
    run_products(arguments, kernels, out);
  }
  for (int64_t n = 0; n < N * M; ++n) out[n] = std::sqrt(std::max(out[n], out[n] != out[n] ? out[n] : 0.0));
  return torch::stable::to(squares, left.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("pair_norms", TORCH_BOX(&fc::cpu::pair_norms)); }

#endif
