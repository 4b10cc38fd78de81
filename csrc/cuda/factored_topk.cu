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
  STD_TORCH_CHECK(error == cudaSuccess, "cannot ask the device: ", cudaGetErrorString(error));
  return kBlocksAMultiprocessor * multiprocessors;
}

// Lists are as long as k and a quarter of it, or some tiles, need; a tile's entries fit on top.
template <class T, class Source, class Place, bool kPerRow>
void launch(const Factors& f, int64_t k, bool largest, const std::optional<Tensor>& shift, Results& out) {
  constexpr int64_t size = Tile<T>::kSize;
  const ProductPlan plan = plan_product(f, size);
  const int64_t blocks = std::min(plan.row_blocks * plan.splits, resident_blocks(f.A));
  const int64_t limit = k + std::max<int64_t>(k / 4, kPerRow ? size : 4096);
  const int64_t capacity = limit + (kPerRow ? size : size * size);
  const int64_t lists = kPerRow ? blocks * size : blocks, groups = kPerRow ? f.rows : 1;
  const int64_t parts = kPerRow ? plan.splits : blocks, stride = kPerRow ? k : capacity;
  constexpr auto key_type = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int;
  constexpr auto place_type = sizeof(Place) == 8 ? ScalarType::Long : ScalarType::Int;
  const auto scratch = [&](int64_t n, ScalarType dtype) { return torch::stable::new_empty(f.A, {n}, dtype); };
  const Tensor keys = scratch(lists * capacity, key_type), places = scratch(lists * capacity, place_type);
  const Tensor counts = scratch(groups * parts, ScalarType::Int);
  const Tensor bar = torch::stable::new_zeros(f.A, {1}, key_type);
  const Tensor found_keys = kPerRow ? scratch(groups * parts * k, key_type) : keys;
  const Tensor found_places = kPerRow ? scratch(groups * parts * k, place_type) : places;
  const TopkArguments s{.A = f.A.data_ptr(),
                        .B = f.B.data_ptr(),
                        .shift = data_of<const void>(shift),
                        .keys = keys.data_ptr(),
                        .places = places.data_ptr(),
                        .bar = bar.data_ptr(),
                        .found_keys = found_keys.data_ptr(),
                        .found_places = found_places.data_ptr(),
                        .counts = data_of<int>(counts),
                        .rows = f.rows,
                        .columns = f.columns,
                        .rank = f.rank,
                        .row_blocks = plan.row_blocks,
                        .splits = plan.splits,
                        .columns_a_split = plan.columns_a_split,
                        .k = static_cast<int>(k),
                        .limit = static_cast<int>(limit),
                        .capacity = static_cast<int>(capacity),
                        .largest = largest};
  const cudaStream_t stream = current_stream(f.A);
  const auto grid = [](int64_t n) { return static_cast<unsigned>(n); };
  if constexpr (kPerRow)
    factored_topk_rows_kernel<T, Source><<<grid(blocks), kThreads, 0, stream>>>(s);
  else
    factored_topk_kernel<T, Source><<<grid(blocks), kThreads, 0, stream>>>(s);
  factored_topk_join<T, Place>
      <<<grid(groups), kThreads, 0, stream>>>(s.found_keys, s.found_places, s.counts, kPerRow ? nullptr : s.bar,
                                              static_cast<int>(parts), static_cast<int>(stride), s.k);
  factored_topk_order<T, Place><<<grid(ceil_div(groups * k, kThreads)), kThreads, 0, stream>>>(
      s.found_keys, s.found_places, parts * stride, groups, s.k, f.columns, largest, data_of<T>(out.values),
      data_of<int64_t>(out.rows), data_of<int64_t>(out.columns));
  check_launch();
}

template <class T, class Source>
void launch(const Factors& f, int64_t k, bool largest, bool per_row, const std::optional<Tensor>& shift, Results& out) {
  if (per_row)
    launch<T, Source, int, true>(f, k, largest, shift, out);
  else
    launch<T, Source, int64_t, false>(f, k, largest, shift, out);
}

std::tuple<Tensor, Tensor, Tensor> factored_topk(const Tensor& A, const Tensor& B, int64_t k, bool largest,
                                                 bool per_row, const std::optional<Tensor>& shift,
                                                 const std::string& screen) {
  check_device();
  Sizes sizes = check_product(A, B);
  sizes("shift", shift, "N");
  const Factors f = factors(A, B);
  const int64_t most = per_row ? std::min(kMostRowEntries, f.columns) : std::min(kMostEntries, f.rows * f.columns);
  STD_TORCH_CHECK(k >= 1 && k <= most, "k is ", k, ", expected 1 to ", most);
  STD_TORCH_CHECK(screen == "auto" || screen == "none",
                  screen == "bf16" ? "screen is 'bf16', which the CUDA C++ kernels do not have; use 'triton'"
                                   : "screen is '" + screen + "', expected 'auto' or 'none' on the CUDA backend");
  STD_TORCH_CHECK(!per_row || (f.rows < kMostBlocks && f.columns < kMostBlocks), "A @ B has shape [", f.rows, ", ",
                  f.columns, "]: too large for one launch");
  const ScalarType work = result_dtype(A);
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  const std::optional<Tensor> shift_c = contiguous_as(shift, work);
  const std::vector<int64_t> shape = per_row ? std::vector<int64_t>{f.rows, k} : std::vector<int64_t>{k};
  Results out{torch::stable::new_empty(A, shape, work), torch::stable::new_empty(A, shape, ScalarType::Long),
              torch::stable::new_empty(A, shape, ScalarType::Long)};
  if (out.values.numel() == 0) return {out.values, out.rows, out.columns};
  with_types("A", A, [&]<class T, class Source>() { launch<T, Source>(f, k, largest, per_row, shift_c, out); });
  return {out.values, out.rows, out.columns};
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("factored_topk", TORCH_BOX(&fc::cuda::factored_topk)); }
