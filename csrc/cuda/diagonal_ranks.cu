// diagonal_ranks on CUDA tensors: check, empty return, dispatch, launch.
#include <torch/csrc/stable/library.h>

#include "diagonal_ranks.cuh"
#include "product.h"

namespace fc::cuda {
namespace {

template <class T, class Source>
void launch(const Factors& f, const Tensor& columns, Tensor& ranks) {
  const ProductPlan plan = plan_product(f, Tile<T>::kSize);
  const Tensor entries = torch::stable::new_empty(f.A, {f.rows}, result_dtype(f.A));
  const RankArguments s{.A = f.A.data_ptr(),
                        .B = f.B.data_ptr(),
                        .asked = data_of<const int64_t>(columns),
                        .entries = entries.data_ptr(),
                        .ranks = data_of<unsigned long long>(ranks),
                        .rows = f.rows,
                        .columns = f.columns,
                        .rank = f.rank,
                        .splits = plan.splits,
                        .columns_a_split = plan.columns_a_split};
  const cudaStream_t stream = current_stream(f.A);
  diagonal_entries<T, Source><<<static_cast<unsigned>(ceil_div(f.rows, kThreads)), kThreads, 0, stream>>>(s);
  diagonal_ranks_kernel<T, Source><<<static_cast<unsigned>(plan.row_blocks * plan.splits), kThreads, 0, stream>>>(s);
  check_launch();
}

Tensor diagonal_ranks(const Tensor& A, const Tensor& B, const Tensor& columns) {
  check_device();
  Sizes sizes = check_product(A, B);
  sizes("columns", columns, "N", ScalarType::Long);
  const Factors f = factors(A, B);
  STD_TORCH_CHECK(f.columns > 0 || f.rows == 0, "B has shape ", shape_of(B), ": no columns");
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  Tensor ranks = torch::stable::new_empty(A, {f.rows}, ScalarType::Long);
  if (f.rows == 0) return ranks;
  const Tensor asked = torch::stable::contiguous(columns);
  with_types("A", A, [&]<class T, class Source>() { launch<T, Source>(f, asked, ranks); });
  return ranks;
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("diagonal_ranks", TORCH_BOX(&fc::cuda::diagonal_ranks)); }
