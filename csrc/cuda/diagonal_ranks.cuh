// diagonal_ranks' epilogue: counts the entries of each row that are greater than one of them. Torch-free.
#pragma once

#include <math_constants.h>

#include "tile.cuh"

namespace fc::cuda {

struct RankArguments {
  Product product;
  const int64_t* asked;       // [N] columns
  void* entries;              // [N], the entries to compare with
  unsigned long long* ranks;  // [N]
};

// The entries asked for, by the same multiply-adds in the same order as a tile's: equal to the bit. A column that
// is not there ranks -1.
template <class T, class Source>
__global__ void __launch_bounds__(kThreads) diagonal_entries(const RankArguments s) {
  const Product& p = s.product;
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t column = s.asked[row];
  const bool valid = column >= 0 && column < p.columns;
  const Source* left = static_cast<const Source*>(p.A) + row * p.rank;
  const Source* right = static_cast<const Source*>(p.B) + (valid ? column : 0);
  T sum = 0;
  for (int64_t k = 0; k < p.rank; ++k) sum = fma(static_cast<T>(left[k]), static_cast<T>(right[k * p.columns]), sum);
  static_cast<T*>(s.entries)[row] = valid ? sum : T(CUDART_NAN);  // nothing is greater than NaN
  s.ranks[row] = valid ? 0 : ~0ull;                               // -1
}

template <class T>
struct RankEpilogue {
  using Core = Tile<T>;

  const RankArguments& s;
  int64_t first_row, end_column;
  int greater[Core::kMicro] = {};

  // The entries to compare with are read again for every tile: they lie in the L1 cache, and registers are short.
  __device__ void operator()(typename Core::Micro& product, int64_t first_column) {
#pragma unroll
    for (int i = 0; i < Core::kMicro; ++i) {
      const int64_t row = first_row + Core::row(i);
      const T entry = row < s.product.rows ? static_cast<const T*>(s.entries)[row] : T(CUDART_NAN);
#pragma unroll
      for (int j = 0; j < Core::kMicro; ++j)
        greater[i] += product[i][j] > entry && first_column + Core::column(j) < end_column;
    }
  }

  // Joins the threads of each row, a half-warp. Sums of integers are the same in any order.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < Core::kMicro; ++i) {
      for (int n = kSide / 2; n > 0; n /= 2) greater[i] += __shfl_xor_sync(~0u, greater[i], n);
      if (Core::column_lane() == 0 && greater[i] > 0)
        atomicAdd(&s.ranks[first_row + Core::row(i)], static_cast<unsigned long long>(greater[i]));
    }
  }
};

template <class T, class Source>
__global__ void __launch_bounds__(kThreads) diagonal_ranks_kernel(const RankArguments s) {
  __shared__ typename Tile<T>::Shared shared;
  const ProductTask<T, Source> task(s.product, blockIdx.x);
  RankEpilogue<T> epilogue{s, task.first_row, task.end_column};
  task.sweep(shared, epilogue);
  epilogue.finish();
}

}  // namespace fc::cuda
