// diagonal_ranks on CUDA tensors: check, empty return, dispatch, launch.
#include <torch/csrc/stable/library.h>

#include "diagonal_ranks.cuh"
#include "product.h"

namespace fc::cuda {
namespace {

template <class T, class Source>
void launch(const Factors& f, const Tensor& columns, Tensor& ranks) {
  const Tensor entries = torch::stable::new_empty(f.A, {f.rows()}, result_dtype(f.A));
  const RankArguments s{.product = f.cut(Tile<T>::kSize),
                        .asked = data_of<const int64_t>(columns),
                        .entries = entries.data_ptr(),
                        .ranks = data_of<unsigned long long>(ranks)};
  start(diagonal_entries<T, Source>, ceil_div(f.rows(), kThreads), f.A, s);
  start(diagonal_ranks_kernel<T, Source>, s.product.row_blocks * s.product.splits, f.A, s);
}

Tensor diagonal_ranks(const Tensor& A, const Tensor& B, const Tensor& columns) {
  check_device();
  Sizes sizes = check_product(A, B);
  sizes("columns", columns, "N", Kind::index);
  const Factors f(A, B);
  FC_CHECK(f.columns() > 0 || f.rows() == 0, "B has shape ", shape_of(B), ": no columns");
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  Tensor ranks = torch::stable::new_empty(A, {f.rows()}, ScalarType::Long);
  if (f.rows() == 0) return ranks;
  const Tensor asked = torch::stable::contiguous(columns);
  with_types(A, [&]<class T, class Source>() { launch<T, Source>(f, asked, ranks); });
  return ranks;
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("diagonal_ranks", TORCH_BOX(&fc::cuda::diagonal_ranks)); }
