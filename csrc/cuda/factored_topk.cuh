// factored_topk's epilogue: entries that could be among the k first join a list, cut back to k when it is full.
// Torch-free.
//
// First means: better value, then lower place (row, then column). What holds throughout:
// - A list has the k first of all entries its block has met, and maybe others: an entry is turned away only if k of the
//   list come before it. `last` is the k-th of when the list was last cut, so later entries after it are turned away.
// - The bar all blocks share is the k-th value of some list, so k entries reach it: those below it are turned away. It
//   only rises; to read an old one costs time alone. Equal entries may still be first by their places, and pass.
// - A tile adds at most its own size to a list, and a list with more than `limit` entries is cut before the next tile.
// - Whether a block cuts is decided by all of its threads together (__syncthreads_or), so barriers meet.
// So the final k are the same whatever the blocks' order and number; only the order within lists differs.
#pragma once

#include <math_constants.h>

#include "select.cuh"
#include "tile.cuh"

namespace fc::cuda {

struct TopkArguments {
  Product product;
  const void* shift;                // [N] of the entries' type, or null
  void *keys, *places;              // lists: a block's, [blocks, capacity]; per row, [blocks, rows of a tile, capacity]
  void* bar;                        // one key, zero
  void *found_keys, *found_places;  // per row, what each split of the columns has found: [N, splits, k]
  int* counts;                      // [blocks]; per row [N, splits]
  int k, limit, capacity;
  bool largest;
};

// An entry as it is compared: greater is better, and NaN is -inf.
template <class T>
static __device__ T compared(T product, T shift, bool largest) {
  const T entry = product - shift;
  return fmax(largest ? entry : -entry, static_cast<T>(-CUDART_INF));
}

// One list for all entries of a block.
template <class T>
struct TopkEpilogue {
  using Core = Tile<T>;
  using Key = typename Ordered<T>::Key;

  struct Shared {
    int bins[kBins];
    int count;
    Last<Key, int64_t> last;
  };

  const TopkArguments& s;
  Shared& shared;
  List<Key, int64_t> list;
  int64_t first_row = 0, end_column = 0;

  __device__ void operator()(typename Core::Micro& product, int64_t first_column) {
    const Key seen = *static_cast<const volatile Key*>(s.bar);
    const Last<Key, int64_t> last = shared.last;
    const T bar = Ordered<T>::value(seen > last.key ? seen : last.key);  // NaN at first: nothing is below it
    bool any = false;
#pragma unroll
    for (int i = 0; i < Core::kMicro; ++i) {
      const int64_t row = first_row + Core::row(i);
      const T shift = s.shift && row < s.product.rows ? static_cast<const T*>(s.shift)[row] : T(0);
#pragma unroll
      for (int j = 0; j < Core::kMicro; ++j) {
        const T x = compared(product[i][j], shift, s.largest);
        const bool passes = !(x < bar) && row < s.product.rows && first_column + Core::column(j) < end_column;
        product[i][j] = passes ? x : T(CUDART_NAN);
        any |= passes;
      }
    }
    bool full = false;
    if (any) {
#pragma unroll
      for (int i = 0; i < Core::kMicro; ++i)
#pragma unroll
        for (int j = 0; j < Core::kMicro; ++j) {
          const T x = product[i][j];
          if (isnan(x)) continue;
          const Key key = Ordered<T>::key(x);
          const int64_t place = (first_row + Core::row(i)) * s.product.columns + first_column + Core::column(j);
          if (!last.reached_by(key, place)) continue;
          const int at = atomicAdd(&shared.count, 1);
          list.keys[at] = key;
          list.places[at] = place;
          full |= at >= s.limit;
        }
    }
    if (__syncthreads_or(full)) cut();
  }

  __device__ void cut() {
    const Last<Key, int64_t> last = keep_first<WholeBlock>(shared.bins, list, shared.count, s.k);
    if (threadIdx.x == 0) {
      shared.count = s.k;
      shared.last = last;
      atomicMax(static_cast<Key*>(s.bar), last.key);
    }
    __syncthreads();
  }
};

template <class T, class Source>
__global__ void __launch_bounds__(kThreads) factored_topk_kernel(const TopkArguments s) {
  using Key = typename Ordered<T>::Key;
  __shared__ typename Tile<T>::Shared shared;
  __shared__ typename TopkEpilogue<T>::Shared state;
  const int64_t own = int64_t{blockIdx.x} * s.capacity;
  const List<Key, int64_t> list{static_cast<Key*>(s.keys) + own, static_cast<int64_t*>(s.places) + own};
  if (threadIdx.x == 0) state.count = 0, state.last = {0, 0};
  __syncthreads();
  TopkEpilogue<T> epilogue{s, state, list};
  for (int64_t n = blockIdx.x; n < s.product.row_blocks * s.product.splits; n += gridDim.x) {
    const ProductTask<T, Source> task(s.product, n);
    epilogue.first_row = task.first_row, epilogue.end_column = task.end_column;
    task.sweep(shared, epilogue);
  }
  if (state.count > s.k) epilogue.cut();
  if (threadIdx.x == 0) s.counts[blockIdx.x] = state.count;
}

// A list for every row of a tile. Columns ascend, so of equal entries those that came first stay.
template <class T>
struct RowTopkEpilogue {
  using Core = Tile<T>;
  using Key = typename Ordered<T>::Key;
  static constexpr int kWarps = kThreads / 32;

  struct Shared {
    int bins[kWarps][kBins];
    int counts[Core::kSize];
    T bars[Core::kSize];  // NaN at first: nothing is below it
  };

  const TopkArguments& s;
  Shared& shared;
  List<Key, int> lists;  // of the tile's first row
  int64_t first_row, end_column;

  __device__ void operator()(typename Core::Micro& product, int64_t first_column) {
    bool full = false;
#pragma unroll
    for (int i = 0; i < Core::kMicro; ++i) {
      const int row = Core::row(i);
      if (first_row + row >= s.product.rows) continue;
      const T shift = s.shift ? static_cast<const T*>(s.shift)[first_row + row] : T(0);
      const T bar = shared.bars[row];
      const List<Key, int> list = lists.from(int64_t{row} * s.capacity);
#pragma unroll
      for (int j = 0; j < Core::kMicro; ++j) {
        const T x = compared(product[i][j], shift, s.largest);
        const int64_t column = first_column + Core::column(j);
        if (x <= bar || column >= end_column) continue;
        const int at = atomicAdd(&shared.counts[row], 1);
        list.keys[at] = Ordered<T>::key(x);
        list.places[at] = static_cast<int>(column);
        full |= at >= s.limit;
      }
    }
    if (__syncthreads_or(full)) cut(s.limit);
  }

  // Cuts the lists with more entries than `most`, each by one warp.
  __device__ void cut(int most) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    for (int row = warp; row < Core::kSize; row += kWarps) {
      const int count = shared.counts[row];
      if (count <= most) continue;
      const auto last = keep_first<OneWarp>(shared.bins[warp], lists.from(int64_t{row} * s.capacity), count, s.k);
      if (OneWarp::rank() == 0) shared.counts[row] = s.k, shared.bars[row] = Ordered<T>::value(last.key);
    }
    __syncthreads();
  }

  __device__ void finish(int64_t split) {
    cut(s.k);
    for (int row = static_cast<int>(threadIdx.x) / 32; row < Core::kSize; row += kWarps) {
      if (first_row + row >= s.product.rows) continue;
      const int64_t out = (first_row + row) * s.product.splits + split;
      const List<Key, int> list = lists.from(int64_t{row} * s.capacity);
      for (int i = OneWarp::rank(); i < shared.counts[row]; i += 32) {
        static_cast<Key*>(s.found_keys)[out * s.k + i] = list.keys[i];
        static_cast<int*>(s.found_places)[out * s.k + i] = list.places[i];
      }
      if (OneWarp::rank() == 0) s.counts[out] = shared.counts[row];
    }
    __syncthreads();  // before the next task begins its lists
  }
};

template <class T, class Source>
__global__ void __launch_bounds__(kThreads) factored_topk_rows_kernel(const TopkArguments s) {
  using Key = typename Ordered<T>::Key;
  __shared__ typename Tile<T>::Shared shared;
  __shared__ typename RowTopkEpilogue<T>::Shared state;
  const int64_t own = int64_t{blockIdx.x} * Tile<T>::kSize * s.capacity;
  const List<Key, int> lists{static_cast<Key*>(s.keys) + own, static_cast<int*>(s.places) + own};
  for (int64_t n = blockIdx.x; n < s.product.row_blocks * s.product.splits; n += gridDim.x) {
    const ProductTask<T, Source> task(s.product, n);
    for (int row = static_cast<int>(threadIdx.x); row < Tile<T>::kSize; row += kThreads)
      state.counts[row] = 0, state.bars[row] = Ordered<T>::value(0);
    __syncthreads();
    RowTopkEpilogue<T> epilogue{s, state, lists, task.first_row, task.end_column};
    task.sweep(shared, epilogue);
    epilogue.finish(task.split);
  }
}

// Joins the lists of each group (all entries, or a row's): its k first end up at the start of its first list.
template <class T, class Place>
__global__ void __launch_bounds__(kThreads)
    factored_topk_join(void* keys, void* places, const int* counts, const void* bar, int parts, int stride, int k) {
  using Key = typename Ordered<T>::Key;
  __shared__ int bins[kBins];
  const int64_t group = blockIdx.x, own = group * parts * stride;
  const List<Key, Place> list{static_cast<Key*>(keys) + own, static_cast<Place*>(places) + own};
  const Key lowest = bar ? *static_cast<const Key*>(bar) : Key(0);
  int n = 0;
  for (int part = 0; part < parts; ++part)
    n += move<WholeBlock>(bins, list.from(int64_t{part} * stride), counts[group * parts + part], list.from(n),
                          [&](Key key, Place) { return key >= lowest; });
  if (n > k) keep_first<WholeBlock>(bins, list, n, k);
}

// Puts each of a group's k entries in its place, which is the number of those that come before it.
template <class T, class Place>
__global__ void __launch_bounds__(kThreads)
    factored_topk_order(const void* keys, const void* places, int64_t stride, int64_t groups, int k, int64_t columns,
                        bool largest, T* values, int64_t* rows, int64_t* found) {  // [groups, k] each
  using Key = typename Ordered<T>::Key;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= groups * k) return;
  const int64_t group = n / k;
  const Key* listed = static_cast<const Key*>(keys) + group * stride;
  const Place* at = static_cast<const Place*>(places) + group * stride;
  const Key key = listed[n % k];
  const Place place = at[n % k];
  int64_t out = group * k;
  for (int i = 0; i < k; ++i) out += listed[i] > key || (listed[i] == key && at[i] < place);
  const T value = Ordered<T>::value(key);
  values[out] = largest ? value : 0 - value;  // no -0.0
  rows[out] = group + place / columns;
  found[out] = place % columns;
}

}  // namespace fc::cuda
