// diagonal_ranks on CUDA tensors: check, empty return, dispatch, launch.
#include <torch/csrc/stable/library.h>

#include "diagonal_ranks.cuh"
#include "product.h"

namespace fc::cuda {
namespace {

template <class T, class Source>
void launch(const Factors& f, const Tensor& columns, Tensor& ranks) {
  const ProductPlan plan = plan_product(f, Tile<T>::kSize);
  const Tensor bars = torch::stable::new_empty(f.A, {f.rows}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  const RankArguments s{.A = f.A.data_ptr(),
                        .B = f.B.data_ptr(),
                        .asked = static_cast<const int64_t*>(columns.data_ptr()),
                        .bars = bars.data_ptr(),
                        .ranks = static_cast<unsigned long long*>(ranks.data_ptr()),
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
  const Factors f = factors(A, B);
  FC_CHECK_SHAPE(columns, (Shape{f.rows}));
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long, "columns must be int64");
  STD_TORCH_CHECK(columns.device() == A.device(), "columns is not on A's device");
  STD_TORCH_CHECK(f.columns > 0 || f.rows == 0, "B has shape ", shape_of(B), ": no columns");
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  Tensor ranks = torch::stable::new_empty(A, {f.rows}, ScalarType::Long);
  if (f.rows == 0) return ranks;
  const Tensor asked = torch::stable::contiguous(columns);
  switch (A.scalar_type()) {
    case ScalarType::Float:
      launch<float, float>(f, asked, ranks);
      break;
    case ScalarType::Double:
      launch<double, double>(f, asked, ranks);
      break;
    case ScalarType::BFloat16:
      launch<float, __nv_bfloat16>(f, asked, ranks);
      break;
    default:
      STD_TORCH_CHECK(false, "A has an unsupported dtype; expected float32, float64 or bfloat16");
  }
  return ranks;
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("diagonal_ranks", TORCH_BOX(&fc::cuda::diagonal_ranks)); }
