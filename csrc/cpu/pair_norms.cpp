// pair_norms on the CPU: the Frobenius norms of all left[i] @ right[j]. A task packs some right factors side by side
// and multiplies left factors by them; the squares of each product are summed before the next, so that none reaches
// memory. Sums run in an order that depends on the shapes alone: results do not depend on threads.
#include "dispatch.h"
#include "interrupts.h"

namespace fc::cpu {

struct PairArguments {
  Strided<3> left, right;                     // [N,r,d] and [M,d,s] of one type
  const int64_t* before;                      // [M] or null: only pairs with i < before[j]
  int64_t lefts, rights, rank, depth, width;  // N, M, r, d, s
};

struct PairBlock {
  int64_t first_left, end_left, first_right, end_right;
};

// Inner indices that are multiplied together: a chunk of all panels of a task stays in the L2 cache.
constexpr int64_t kStepsAChunk = 256;

struct PairKernels {
  int64_t (*packed_bytes)(const PairArguments&);  // of one left factor
  void (*pack)(const PairArguments&, void* packed, int64_t left);
  void (*products)(const PairArguments&, const void* packed, const PairBlock&, double* squares);  // in fp64
};

}  // namespace fc::cpu

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {
namespace {

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

  static void pack(const PairArguments& p, void* packed, int64_t i) {
    pack_rows<Scheme>(static_cast<Left*>(packed) + i * packed_size(p), p.left.at<Source>(i), p.rank, p.depth,
                      p.left.stride[1], p.left.stride[2]);
  }

  // Packs right factors first..end side by side as panels [panel][step][kW]: a factor may end in the middle of a panel.
  static void pack_rights(const PairArguments& p, Right* panels, int64_t first, int64_t end) {
    const int64_t depth = steps<Scheme>(p.depth), columns = (end - first) * p.width;
    const int64_t padded = panels_of<Scheme>(columns) * kW;
    for (int64_t c = 0; c < padded; ++c) {
      Right* out = panels + c / kW * depth * kW + c % kW;
      if (c >= columns) {
        for (int64_t step = 0; step < depth; ++step) out[step * kW] = 0;
        continue;
      }
      const Source* column = p.right.at<Source>(first + c / p.width) + c % p.width * p.right.stride[2];
      for (int64_t step = 0; step < depth; ++step)
        out[step * kW] = Scheme::right(column + step * Scheme::kDepth * p.right.stride[1], p.right.stride[1],
                                       p.depth - step * Scheme::kDepth);
    }
  }

  static void products(const PairArguments& p, const void* packed, const PairBlock& block, double* squares) {
    const int64_t depth = steps<Scheme>(p.depth), blocks = blocks_of(p.rank);
    const int64_t columns = (block.end_right - block.first_right) * p.width, panels = panels_of<Scheme>(columns);
    Buffer<Right> rights{panels * kW * depth};
    pack_rights(p, rights.data, block.first_right, block.end_right);
    Buffer<T> tiles{panels * blocks * kTile};
    const auto right_at = [&](int64_t column) { return block.first_right + smaller(column, columns - 1) / p.width; };

    for (int64_t i = block.first_left; i < block.end_left; ++i) {
      look_for_interrupt();
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

  // Sums the squares down each column, kRows at a time, so that no accumulator takes more than r / kRows addends.
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

  static const PairKernels* kernels() {
    static constexpr PairKernels table{packed_bytes, pack, products};
    return &table;
  }
};

}  // namespace

const PairKernels* pair_kernels(Arithmetic arithmetic) { return select<Pairs>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <cmath>

namespace fc::cpu {

FC_TIERS(const PairKernels*, pair_kernels, Arithmetic)

namespace {

// Right factors packed together: as many as fill their panels best, within what the L2 cache holds of a chunk.
int64_t rights_at_once(int64_t width, int64_t element_bytes) {
  const int64_t panel = panel_bytes(current_tier()) / element_bytes;
  const int64_t most = caches().l2 / (kStepsAChunk * element_bytes);  // columns
  const auto waste = [&](int64_t n) { return static_cast<double>(ceil_div(n * width, panel) * panel) / (n * width); };
  int64_t best = 1;
  for (int64_t n = 2; n * width <= most; ++n)
    if (waste(n) < waste(best) - 1e-9) best = n;
  return best;
}

void run_products(const PairArguments& p, const PairKernels& kernels, int64_t element_bytes, double* squares) {
  const int64_t threads = torch::stable::get_num_threads();
  const HugeScratch packed(p.lefts * kernels.packed_bytes(p));
  run_tasks(p.lefts, [&](int64_t i) { kernels.pack(p, packed.data(), i); });

  const int64_t across = rights_at_once(p.width, element_bytes), stripes = ceil_div(p.rights, across);
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
  Sizes sizes;
  sizes("left", left, "N r d");
  sizes("right", right, "M d s");
  sizes("before", before, "M", Kind::index);
  const int64_t N = sizes["N"], M = sizes["M"], r = sizes["r"], d = sizes["d"], s = sizes["s"];
  const PairKernels& kernels = *pick(pick_pair_kernels, "left", left, precision);

  Tensor squares = torch::stable::new_empty(left, {N, M}, ScalarType::Double);
  auto* out = data_of<double>(squares);
  const std::optional<Tensor> before_c = contiguous_as(before, ScalarType::Long);
  const PairArguments arguments{strided<3>(left), strided<3>(right), data_of<const int64_t>(before_c), N, M, r, d, s};
  if (N * M == 0 || r == 0 || d == 0 || s == 0)
    std::fill(out, out + N * M, 0.0);
  else
    run_products(arguments, kernels, result_dtype(left) == ScalarType::Double ? 8 : 4, out);
  for (int64_t n = 0; n < N * M; ++n) out[n] = std::sqrt(out[n]);
  return torch::stable::to(squares, result_dtype(left));
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("pair_norms", TORCH_BOX(&fc::cpu::pair_norms)); }

#endif
