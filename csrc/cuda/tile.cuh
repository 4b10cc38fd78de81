// The tile core: a low-rank product consumed by an epilogue before it is stored. Torch-free.
//
// A block of 16 x 16 threads walks the column tiles of one row tile. Slices of both factors are staged in shared memory
// in the accumulator's type; every thread multiplies a micro-tile in registers, exact in that type (no tensor cores);
// the op's epilogue is handed the micro-tiles and never sees where they came from.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace fc::cuda {

inline constexpr int kSide = 16;  // threads along each side of a tile
inline constexpr int kThreads = kSide * kSide;
inline constexpr int kDepth = 16;  // inner indices staged together

template <class T>
struct Matrix {  // rows x columns, elements of a row consecutive
  const T* data;
  int64_t stride, rows, columns;

  template <class Accumulator>
  __device__ Accumulator at(int64_t i, int64_t j) const {
    return i < rows && j < columns ? static_cast<Accumulator>(data[i * stride + j]) : Accumulator(0);
  }
};

template <class T>
struct Tile {
  static constexpr int kVector = 16 / sizeof(T);  // one shared-memory load
  static constexpr int kMicro = 2 * kVector;      // rows and columns of a micro-tile
  static constexpr int kSize = kSide * kMicro;    // rows and columns of a tile

  using Micro = T[kMicro][kMicro];

  // Where index `i` of a micro-tile lies in its tile, for the thread at `lane` of that side.
  static __device__ int place(int lane, int i) { return (i / kVector * kSide + lane) * kVector + i % kVector; }
  static __device__ int row_lane() { return static_cast<int>(threadIdx.x) / kSide; }
  static __device__ int column_lane() { return static_cast<int>(threadIdx.x) % kSide; }
  static __device__ int row(int i) { return place(row_lane(), i); }
  static __device__ int column(int j) { return place(column_lane(), j); }

  struct Shared {
    alignas(16) T left[kDepth][kSize + kVector];  // transposed; the pad spreads the stores over the banks
    alignas(16) T right[kDepth][kSize];
  };

  struct alignas(16) Vector {
    T x[kVector];
  };

  static __device__ void read(T (&out)[kMicro], const T* staged, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Vector v = *reinterpret_cast<const Vector*>(staged + place(lane, h * kVector));
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[h * kVector + i] = v.x[i];
    }
  }

  // micro += left[first_row.., :] @ right[:, first_column..], zero past the ends of either.
  template <class Left, class Right>
  static __device__ void multiply(Micro& micro, Shared& shared, const Matrix<Left>& left, const Matrix<Right>& right,
                                  int64_t first_row, int64_t first_column) {
    for (int64_t k = 0; k < right.rows; k += kDepth) {
      __syncthreads();  // the previous slice has been read
#pragma unroll 2
      for (int n = static_cast<int>(threadIdx.x); n < kDepth * kSize; n += kThreads) {
        shared.left[n % kDepth][n / kDepth] = left.template at<T>(first_row + n / kDepth, k + n % kDepth);
        shared.right[n / kSize][n % kSize] = right.template at<T>(k + n / kSize, first_column + n % kSize);
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        T a[kMicro], b[kMicro];
        read(a, shared.left[d], row_lane());
        read(b, shared.right[d], column_lane());
#pragma unroll
        for (int i = 0; i < kMicro; ++i)
#pragma unroll
          for (int j = 0; j < kMicro; ++j) micro[i][j] = fma(a[i], b[j], micro[i][j]);
      }
    }
  }

  // Hands every tile of columns [first_column, end_column) to epilogue(micro, first_column of the tile).
  template <class Left, class Right, class Epilogue>
  static __device__ void sweep_columns(Shared& shared, const Matrix<Left>& left, const Matrix<Right>& right,
                                       int64_t first_row, int64_t first_column, int64_t end_column,
                                       Epilogue& epilogue) {
    for (int64_t column = first_column; column < end_column; column += kSize) {
      Micro micro = {};
      multiply(micro, shared, left, right, first_row, column);
      epilogue(micro, column);
    }
  }
};

// A @ B cut into tasks: row tiles times parts of the columns.
struct Product {
  const void *A, *B;  // [N,r], [r,M], contiguous, of one type
  int64_t rows, columns, rank, row_blocks, splits, columns_a_split;
};

template <class T, class Source>
struct ProductTask {
  int64_t first_row, first_column, end_column, split;
  Matrix<Source> left, right;

  __device__ ProductTask(const Product& p, int64_t task)
      : first_row(task / p.splits * Tile<T>::kSize), split(task % p.splits) {
    first_column = split * p.columns_a_split;
    end_column = min(first_column + p.columns_a_split, p.columns);
    left = {static_cast<const Source*>(p.A), p.rank, p.rows, p.rank};
    right = {static_cast<const Source*>(p.B), p.columns, p.rank, end_column};
  }

  template <class Epilogue>
  __device__ void sweep(typename Tile<T>::Shared& shared, Epilogue& epilogue) const {
    Tile<T>::sweep_columns(shared, left, right, first_row, first_column, end_column, epilogue);
  }
};

}  // namespace fc::cuda
