// The CUDA kernels of factored_topk behind a C function, for tests/test_cuda_on_cpu.py.
#include "fibers.h"
// The kernels are text like any other from here on.
#include "../../csrc/cuda/factored_topk.cuh"
#include "../../csrc/plan.h"

namespace fc::cuda {

// Memory whose end is watched.
template <class T>
struct Buffer {
  static constexpr size_t kGuard = 64;
  std::vector<T> data;
  explicit Buffer(int64_t n) : data(static_cast<size_t>(n) + kGuard, T(77)) {}
  ~Buffer() {
    for (size_t i = data.size() - kGuard; i < data.size(); ++i)
      if (data[i] != T(77)) std::fputs("written past the end of a buffer\n", stderr), std::abort();
  }
};

struct Sizes {
  int64_t rows, columns, rank, k, splits, blocks, limit;
  bool largest, per_row;
};

Product product(const Sizes& z, const void* A, const void* B, int64_t size) {
  return {.A = A,
          .B = B,
          .rows = z.rows,
          .columns = z.columns,
          .rank = z.rank,
          .row_blocks = ceil_div(z.rows, size),
          .splits = z.splits,
          .columns_a_split = ceil_div(ceil_div(z.columns, size), z.splits) * size};
}

template <class T, class Source, class Place>
void topk(const Sizes& z, const void* A, const void* B, const void* shift, T* values, int64_t* rows, int64_t* columns) {
  using Key = typename Ordered<T>::Key;
  constexpr int64_t size = Tile<T>::kSize;
  const int64_t capacity = z.limit + (z.per_row ? size : size * size);
  const int64_t lists = z.per_row ? z.blocks * size : z.blocks, groups = z.per_row ? z.rows : 1;
  const int64_t parts = z.per_row ? z.splits : z.blocks, stride = z.per_row ? z.k : capacity;
  Buffer<Key> keys(lists * capacity), found_keys(groups * parts * z.k);
  Buffer<Place> places(lists * capacity), found_places(groups * parts * z.k);
  Buffer<int> counts(groups * parts);
  Key bar = 0;
  TopkArguments s{.product = product(z, A, B, size),
                  .shift = shift,
                  .keys = keys.data.data(),
                  .places = places.data.data(),
                  .bar = &bar,
                  .found_keys = z.per_row ? found_keys.data.data() : keys.data.data(),
                  .found_places = z.per_row ? found_places.data.data() : places.data.data(),
                  .counts = counts.data.data(),
                  .k = static_cast<int>(z.k),
                  .limit = static_cast<int>(z.limit),
                  .capacity = static_cast<int>(capacity),
                  .largest = z.largest};
  fibers::launch(z.blocks, kThreads, [&] {
    if (z.per_row)
      factored_topk_rows_kernel<T, Source>(s);
    else
      factored_topk_kernel<T, Source>(s);
  });
  fibers::launch(groups, kThreads, [&] {
    factored_topk_join<T, Place>(s.found_keys, s.found_places, s.counts, z.per_row ? nullptr : s.bar,
                                 static_cast<int>(parts), static_cast<int>(stride), s.k);
  });
  fibers::launch(ceil_div(groups * z.k, kThreads), kThreads, [&] {
    factored_topk_order<T, Place>(s.found_keys, s.found_places, parts * stride, groups, s.k, z.columns, z.largest,
                                  values, rows, columns);
  });
}

template <class T, class Source>
void topk(const Sizes& z, const void* A, const void* B, const void* shift, void* values, int64_t* rows,
          int64_t* columns) {
  (z.per_row ? topk<T, Source, int> : topk<T, Source, int64_t>)(z, A, B, shift, static_cast<T*>(values), rows, columns);
}

}  // namespace fc::cuda

using namespace fc::cuda;

// kind: 0 float32, 1 float64, 2 bfloat16.
extern "C" void factored_topk(int kind, const Sizes* z, const void* A, const void* B, const void* shift, void* values,
                              int64_t* rows, int64_t* columns) {
  (kind == 0   ? topk<float, float>
   : kind == 1 ? topk<double, double>
               : topk<float, __nv_bfloat16>)(*z, A, B, shift, values, rows, columns);
}
