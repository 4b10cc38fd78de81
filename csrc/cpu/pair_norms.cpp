// pair_norms on the CPU: the epilogue sums the squares of each left[i] @ right[j], so that no product reaches memory.
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

struct PairKernels {
  int64_t (*packed_bytes)(const PairArguments&);  // of one left factor
  void (*pack)(const PairArguments&, void* packed, int64_t left);
  void (*products)(const PairArguments&, const void* packed, const PairBlock&, double* squares);  // in fp64
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include "tile.h"

namespace fc::cpu::FC_TIER {
namespace {

constexpr int64_t kStepsAChunk = 256;  // of the inner dimension: a chunk of a panel stays in the L1 cache

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
};

template <class Scheme, class Source>
const PairKernels* kernels() {
  using P = Pairs<Scheme, Source>;
  static constexpr PairKernels table{P::packed_bytes, P::pack, P::products};
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

#include "../check.h"
#include "../plan.h"
#include "scratch.h"

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

Tensor pair_norms(const Tensor& left, const Tensor& right, const std::optional<Tensor>& before,
                  const std::string& precision) {
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
  if (N * M == 0 || r == 0 || d == 0 || s == 0)
    std::fill(out, out + N * M, 0.0);
  else
    run_products(arguments, kernels, out);
  for (int64_t n = 0; n < N * M; ++n) out[n] = std::sqrt(out[n]);
  return torch::stable::to(squares, left.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("pair_norms", TORCH_BOX(&fc::cpu::pair_norms)); }

#endif
