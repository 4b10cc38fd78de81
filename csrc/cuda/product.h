// What factored_topk and diagonal_ranks share on the torch side: the factors of A @ B, checked and contiguous.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "../plan.h"
#include "launch.h"

namespace fc::cuda {

using torch::headeronly::ScalarType;

struct Factors {
  Tensor A, B;  // [N,r], [r,M]
  int64_t rows, columns, rank;
};

inline Factors factors(const Tensor& A, const Tensor& B) {
  STD_TORCH_CHECK(A.dim() == 2, "A has shape ", shape_of(A), ", expected [N, r]");
  STD_TORCH_CHECK(B.dim() == 2, "B has shape ", shape_of(B), ", expected [r, M]");
  STD_TORCH_CHECK(A.size(1) == B.size(0), "A has shape ", shape_of(A), " and B ", shape_of(B),
                  ": their inner dimensions r differ");
  STD_TORCH_CHECK(A.scalar_type() == B.scalar_type(), "A and B differ in dtype");
  STD_TORCH_CHECK(A.device() == B.device(), "A and B are on different devices");
  return {torch::stable::contiguous(A), torch::stable::contiguous(B), A.size(0), B.size(1), A.size(1)};
}

// Row tiles and parts of the columns, so that there is work for the whole GPU.
struct ProductPlan {
  int64_t row_blocks, splits, columns_a_split;
};

inline ProductPlan plan_product(const Factors& f, int64_t size) {
  const int64_t row_blocks = ceil_div(f.rows, size), tiles = std::max<int64_t>(ceil_div(f.columns, size), 1);
  const int64_t splits = std::clamp<int64_t>(ceil_div(kBlocksWanted, std::max<int64_t>(row_blocks, 1)), 1, tiles);
  STD_TORCH_CHECK(row_blocks * splits <= kMostBlocks, "A has ", f.rows, " rows: too many for one launch; cut N");
  return {row_blocks, splits, ceil_div(tiles, splits) * size};
}

}  // namespace fc::cuda
