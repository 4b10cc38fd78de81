// sweep_nll's epilogue: a running maximum and sum of exponentials of every row. Torch-free.
#pragma once

#include <math_constants.h>

#include "tile.cuh"

namespace fc::cuda {

struct SweepArguments {
  const void *base, *delta, *basis;  // [T,V], [P,T,r], [G,r,V], contiguous, of one type
  const int64_t* tokens;             // [T,K]
  const int64_t* group;              // [P]
  const double* scale;               // [P,T] or null
  const double* clean_lse;           // [T] or null
  double cap;                        // logits x become cap * tanh(x / cap); 0: they do not
  double* picked;                    // [P,T,K], zero
  int64_t pairs, positions, vocabulary, rank, groups, tokens_per_position;
  int64_t splits = 0, columns_a_split = 0;
  double *lse = nullptr, *change = nullptr;  // partial, [S,P,T]; change may be null
};

// Per thread: the rows of its micro-tile over its own columns, joined across threads only at the end.
template <class T, class Source>
struct SweepEpilogue {
  using Core = Tile<T>;
  static constexpr int kRows = Core::kMicro;
  static constexpr T kLog2e = static_cast<T>(1.4426950408889634);

  const SweepArguments& s;
  int64_t pair, first_row, end_column;
  T highest[kRows], total[kRows], moved[kRows];

  __device__ SweepEpilogue(const SweepArguments& s, int64_t pair, int64_t first_row, int64_t end_column)
      : s(s), pair(pair), first_row(first_row), end_column(end_column) {
    for (int i = 0; i < kRows; ++i) highest[i] = -CUDART_INF, total[i] = moved[i] = 0;
  }

  // Exponentials are powers of 2 relative to this; infinite maxima leave them as they are, so that sums end as 0 or
  // inf.
  static __device__ T reference(T highest) { return isfinite(highest) ? highest * kLog2e : T(0); }

  // What brings a sum to a higher maximum: exactly 1 where the maximum stays.
  static __device__ T rescaled(T total, T highest, T tallest) {
    return total == 0 ? T(0) : total * exp2(reference(highest) - reference(tallest));
  }

  __device__ T capped(T x) const {
    const T cap = static_cast<T>(s.cap);
    return cap > 0 ? cap * tanh(x * (1 / cap)) : x;
  }

  __device__ void operator()(typename Core::Micro& product, int64_t first_column) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t t = first_row + Core::row(i);
      if (t < s.positions) consume(product[i], i, t, first_column);
    }
  }

  __device__ void consume(T (&x)[kRows], int i, int64_t t, int64_t first_column) {
    const Source* base = static_cast<const Source*>(s.base) + t * s.vocabulary + first_column;
    const T scale = s.scale ? static_cast<T>(s.scale[pair * s.positions + t]) : T(1);
    T tallest = highest[i];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const bool inside = first_column + Core::column(j) < end_column;
      const T start = inside ? static_cast<T>(base[Core::column(j)]) : T(0);
      const T product = x[j];
      x[j] = inside ? capped((start + product) * scale) : T(-CUDART_INF);
      tallest = max(tallest, x[j]);
      if (s.clean_lse == nullptr) continue;
      const double lse = s.clean_lse[t];
      const T high = static_cast<T>(lse), low = static_cast<T>(lse - static_cast<double>(high));
      const T clean = capped(start);
      const T probability = exp2(((clean - high) - low) * kLog2e);
      const T change = s.scale || s.cap > 0 ? x[j] - clean : product;
      if (inside && probability > 0) moved[i] += probability * change;
    }
    T sum = rescaled(total[i], highest[i], tallest);
#pragma unroll
    for (int j = 0; j < kRows; ++j) sum += exp2(x[j] * kLog2e - reference(tallest));
    highest[i] = tallest, total[i] = sum;
    for (int64_t k = 0; k < s.tokens_per_position; ++k) {
      const int64_t offset = s.tokens[t * s.tokens_per_position + k] - first_column;
      if (offset < 0 || offset >= Core::kSize) continue;
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        if (offset == Core::column(j) && first_column + offset < end_column)
          s.picked[(pair * s.positions + t) * s.tokens_per_position + k] = x[j];
    }
  }

  // Joins the threads of each row, a half-warp, and stores the split's partial results.
  __device__ void finish(int64_t split) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T tallest = highest[i];
      for (int n = kSide / 2; n > 0; n /= 2) tallest = max(tallest, __shfl_xor_sync(~0u, tallest, n));
      double sum = rescaled(total[i], highest[i], tallest), change = moved[i];
      for (int n = kSide / 2; n > 0; n /= 2) {
        sum += __shfl_xor_sync(~0u, sum, n);
        change += __shfl_xor_sync(~0u, change, n);
      }
      const int64_t t = first_row + Core::row(i);
      if (Core::column_lane() != 0 || t >= s.positions) continue;
      const int64_t out = (split * s.pairs + pair) * s.positions + t;
      // By the same rounded log2(e) as above, so that a row's largest logit comes back as it was.
      s.lse[out] = (static_cast<double>(reference(tallest)) + log2(sum)) / static_cast<double>(kLog2e);
      if (s.change != nullptr) s.change[out] = change;
    }
  }
};

// Ablations are innermost: blocks that run together read the same clean logits from the L2 cache.
template <class T, class Source>
__global__ void __launch_bounds__(kThreads) sweep_nll_kernel(const SweepArguments s) {
  __shared__ typename Tile<T>::Shared shared;
  const int64_t pair = blockIdx.x % s.pairs, rest = blockIdx.x / s.pairs;
  const int64_t split = rest % s.splits, first_row = rest / s.splits * Tile<T>::kSize;
  const int64_t first = split * s.columns_a_split, end = min(first + s.columns_a_split, s.vocabulary);
  const int64_t group = s.group[pair];
  const bool valid = group >= 0 && group < s.groups;
  const int64_t basis = (valid ? group : 0) * s.rank * s.vocabulary;
  const Matrix<Source> left{static_cast<const Source*>(s.delta) + pair * s.positions * s.rank, s.rank, s.positions,
                            s.rank};
  const Matrix<Source> right{static_cast<const Source*>(s.basis) + basis, s.vocabulary, valid ? s.rank : 0, end};
  SweepEpilogue<T, Source> epilogue(s, pair, first_row, end);
  Tile<T>::sweep_columns(shared, left, right, first_row, first, end, epilogue);
  epilogue.finish(split);
}

// Joins the partial results of the vocabulary's splits, in order. A group that does not exist gives NaN.
static __global__ void __launch_bounds__(kThreads)
    sweep_nll_join(const SweepArguments s, double* lse, double* change) {  // [P,T] each
  const int64_t rows = s.pairs * s.positions, row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= rows) return;
  const int64_t group = s.group[row / s.positions];
  const bool valid = group >= 0 && group < s.groups;
  double tallest = -CUDART_INF, sum = 0, moved = 0;
  for (int64_t i = 0; i < s.splits; ++i) tallest = fmax(tallest, s.lse[i * rows + row]);
  const double reference = isfinite(tallest) ? tallest : 0;
  for (int64_t i = 0; i < s.splits; ++i) {
    sum += exp(s.lse[i * rows + row] - reference);
    if (s.change != nullptr) moved += s.change[i * rows + row];
  }
  lse[row] = valid ? reference + log(sum) : CUDART_NAN;
  if (s.change != nullptr) change[row] = valid ? moved : CUDART_NAN;
}

}  // namespace fc::cuda
