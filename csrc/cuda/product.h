// The torch side of a product: the factors of A @ B, contiguous, and their tasks.
#pragma once

#include "launch.h"

namespace fc::cuda {

struct Factors {  // contiguous
  Tensor A, B;    // [N,r], [r,M]

  Factors(const Tensor& A, const Tensor& B) : A(torch::stable::contiguous(A)), B(torch::stable::contiguous(B)) {}
  int64_t rows() const { return A.size(0); }
  int64_t columns() const { return B.size(1); }

  // Tiles of `size` rows and parts of the columns, so that there is work for the whole GPU.
  Product cut(int64_t size) const {
    const int64_t row_blocks = ceil_div(rows(), size), tiles = std::max<int64_t>(ceil_div(columns(), size), 1);
    const int64_t splits = std::clamp<int64_t>(ceil_div(kBlocksWanted, std::max<int64_t>(row_blocks, 1)), 1, tiles);
    FC_CHECK(row_blocks * splits <= kMostBlocks, "A has ", rows(), " rows: too many for one launch; cut N");
    return {A.data_ptr(), B.data_ptr(), rows(), columns(),
            A.size(1),    row_blocks,   splits, ceil_div(tiles, splits) * size};
  }
};

}  // namespace fc::cuda
