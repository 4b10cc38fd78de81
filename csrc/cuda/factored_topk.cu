// factored_topk on CUDA tensors: check, dispatch, launch.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "factored_topk.cuh"
#include "product.h"

namespace fc::cuda {
namespace {

constexpr int64_t kMostEntries = 1 << 16, kMostRowEntries = 1024;  // k
constexpr int64_t kBlocksAMultiprocessor = 2;                      // as many as registers leave room for

struct Results {
  Tensor values, rows, columns;
};

int64_t resident_blocks(const Tensor& like) {
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, like.get_device_index());
  FC_CHECK(error == cudaSuccess, "cannot ask the device: ", cudaGetErrorString(error));
  return kBlocksAMultiprocessor * multiprocessors;
}

// Lists are as long as k and a quarter of it, or some tiles, need; a tile's entries fit on top.
template <class T, class Source, bool kPerRow>
void launch(const Factors& f, int64_t k, bool largest, const std::optional<Tensor>& shift, Results& out) {
  using Place = std::conditional_t<kPerRow, int, int64_t>;
  constexpr int64_t size = Tile<T>::kSize;
  const Product product = f.cut(size);
  const int64_t blocks = std::min(product.row_blocks * product.splits, resident_blocks(f.A));
  const int64_t limit = k + std::max<int64_t>(k / 4, kPerRow ? size : 4096);
  const int64_t capacity = limit + (kPerRow ? size : size * size);
  const int64_t lists = kPerRow ? blocks * size : blocks, groups = kPerRow ? product.rows : 1;
  const int64_t parts = kPerRow ? product.splits : blocks, stride = kPerRow ? k : capacity;
  constexpr auto key_type = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int;
  constexpr auto place_type = sizeof(Place) == 8 ? ScalarType::Long : ScalarType::Int;
  const auto scratch = [&](int64_t n, ScalarType dtype) { return torch::stable::new_empty(f.A, {n}, dtype); };
  const Tensor keys = scratch(lists * capacity, key_type), places = scratch(lists * capacity, place_type);
  const Tensor counts = scratch(groups * parts, ScalarType::Int);
  const Tensor bar = torch::stable::new_zeros(f.A, {1}, key_type);
  const Tensor found_keys = kPerRow ? scratch(groups * parts * k, key_type) : keys;
  const Tensor found_places = kPerRow ? scratch(groups * parts * k, place_type) : places;
  const TopkArguments s{.product = product,
                        .shift = data_of<const void>(shift),
                        .keys = keys.data_ptr(),
                        .places = places.data_ptr(),
                        .bar = bar.data_ptr(),
                        .found_keys = found_keys.data_ptr(),
                        .found_places = found_places.data_ptr(),
                        .counts = data_of<int>(counts),
                        .k = static_cast<int>(k),
                        .limit = static_cast<int>(limit),
                        .capacity = static_cast<int>(capacity),
                        .largest = largest};
  start(kPerRow ? factored_topk_rows_kernel<T, Source> : factored_topk_kernel<T, Source>, blocks, f.A, s);
  start(factored_topk_join<T, Place>, groups, f.A, s.found_keys, s.found_places, s.counts, kPerRow ? nullptr : s.bar,
        static_cast<int>(parts), static_cast<int>(stride), s.k);
  start(factored_topk_order<T, Place>, ceil_div(groups * k, kThreads), f.A, s.found_keys, s.found_places,
        parts * stride, groups, s.k, product.columns, largest, data_of<T>(out.values), data_of<int64_t>(out.rows),
        data_of<int64_t>(out.columns));
}

std::tuple<Tensor, Tensor, Tensor> factored_topk(const Tensor& A, const Tensor& B, int64_t k, bool largest,
                                                 bool per_row, const std::optional<Tensor>& shift,
                                                 const std::string& screen) {
  check_device();
  Sizes sizes = check_product(A, B);
  sizes("shift", shift, "N", Kind::number);
  const Factors f(A, B);
  const int64_t rows = f.rows(), columns = f.columns();
  const int64_t most = per_row ? std::min(kMostRowEntries, columns) : std::min(kMostEntries, rows * columns);
  FC_CHECK(k >= 1 && k <= most, "k is ", k, ", expected 1 to ", most);
  FC_CHECK(screen == "auto" || screen == "none",
           screen == "bf16" ? "screen is 'bf16', which the CUDA C++ kernels do not have; use 'triton'"
                            : "screen is '" + screen + "', expected 'auto' or 'none' on the CUDA backend");
  FC_CHECK(!per_row || (rows < kMostBlocks && columns < kMostBlocks), "A @ B has shape [", rows, ", ", columns,
           "]: too large for one launch");
  const ScalarType work = result_dtype(A);
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  const std::optional<Tensor> shift_c = contiguous_as(shift, work);
  const std::vector<int64_t> shape = per_row ? std::vector<int64_t>{rows, k} : std::vector<int64_t>{k};
  Results out{torch::stable::new_empty(A, shape, work), torch::stable::new_empty(A, shape, ScalarType::Long),
              torch::stable::new_empty(A, shape, ScalarType::Long)};
  if (out.values.numel() == 0) return {out.values, out.rows, out.columns};
  with_types(A, [&]<class T, class Source>() {
    (per_row ? launch<T, Source, true> : launch<T, Source, false>)(f, k, largest, shift_c, out);
  });
  return {out.values, out.rows, out.columns};
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("factored_topk", TORCH_BOX(&fc::cuda::factored_topk)); }
