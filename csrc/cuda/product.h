// What factored_topk and diagonal_ranks share on the torch side: the factors of A @ B, contiguous, and the plan.
#pragma once

#include "../product.h"
#include "launch.h"

namespace fc::cuda {

struct Factors {
  Tensor A, B;  // [N,r], [r,M]
  int64_t rows, columns, rank;
};

inline Factors factors(const Tensor& A, const Tensor& B) {
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
