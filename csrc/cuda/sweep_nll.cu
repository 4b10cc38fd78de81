// sweep_nll on CUDA tensors: check, empty return, dispatch, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../plan.h"
#include "../sweep.h"
#include "launch.h"
#include "sweep_nll.cuh"

namespace fc::cuda {
namespace {

using torch::headeronly::ScalarType;

template <class T, class Source>
void launch(SweepArguments s, const Tensor& like, Tensor& lse, Tensor& change) {
  constexpr int64_t size = Tile<T>::kSize;
  const int64_t row_blocks = s.pairs * ceil_div(s.positions, size), tiles = ceil_div(s.vocabulary, size);
  s.splits = std::clamp<int64_t>(ceil_div(kBlocksWanted, row_blocks), 1, std::max<int64_t>(tiles, 1));
  s.columns_a_split = ceil_div(tiles, s.splits) * size;
  STD_TORCH_CHECK(row_blocks * s.splits <= kMostBlocks, "delta has shape ", s.pairs, " x ", s.positions,
                  ": too many rows for one launch; cut P");
  const auto scratch = [&] {
    return torch::stable::new_empty(like, {s.splits, s.pairs, s.positions}, ScalarType::Double);
  };
  const Tensor partial_lse = scratch(), partial_change = s.clean_lse ? scratch() : partial_lse;
  s.lse = static_cast<double*>(partial_lse.data_ptr());
  s.change = s.clean_lse ? static_cast<double*>(partial_change.data_ptr()) : nullptr;
  const cudaStream_t stream = current_stream(like);
  sweep_nll_kernel<T, Source><<<static_cast<unsigned>(row_blocks * s.splits), kThreads, 0, stream>>>(s);
  sweep_nll_join<<<static_cast<unsigned>(ceil_div(s.pairs * s.positions, kThreads)), kThreads, 0, stream>>>(
      s, static_cast<double*>(lse.data_ptr()), static_cast<double*>(change.data_ptr()));
  check_launch();
}

std::tuple<Tensor, Tensor, Tensor> sweep_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                             const Tensor& tokens, const Tensor& group,
                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& clean_lse,
                                             const std::string& precision, std::optional<double> cap,
                                             const std::optional<Tensor>& outer) {
  check_device();
  STD_TORCH_CHECK(!outer.has_value(), "outer is given, but the CUDA kernel has none: multiply it out");
  const auto [P, T, V, r, G, K] = check_sweep(base, delta, basis, tokens, group, scale, clean_lse, cap);
  STD_TORCH_CHECK(precision == "ieee", "precision is '", precision, "', expected 'ieee' on the CUDA backend");
  const torch::stable::accelerator::DeviceGuard guard(base.get_device_index());

  Tensor lse = torch::stable::new_empty(base, {P, T}, ScalarType::Double);
  Tensor picked = torch::stable::new_zeros(base, {P, T, K}, ScalarType::Double);
  Tensor change = torch::stable::new_empty(base, {clean_lse.has_value() ? P : 0, T}, ScalarType::Double);
  if (P * T == 0) return {lse, picked, change};

  const auto plain = [](const Tensor& x, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::contiguous(dtype.has_value() ? torch::stable::to(x, *dtype) : x);
  };
  const Tensor base_c = plain(base), delta_c = plain(delta), basis_c = plain(basis);
  const Tensor tokens_c = plain(tokens), group_c = plain(group);
  std::optional<Tensor> scale_c, clean_c;
  if (scale.has_value()) scale_c = plain(*scale, ScalarType::Double);
  if (clean_lse.has_value()) clean_c = plain(*clean_lse, ScalarType::Double);
  const SweepArguments s{.base = base_c.data_ptr(),
                         .delta = delta_c.data_ptr(),
                         .basis = basis_c.data_ptr(),
                         .tokens = static_cast<const int64_t*>(tokens_c.data_ptr()),
                         .group = static_cast<const int64_t*>(group_c.data_ptr()),
                         .scale = scale_c.has_value() ? static_cast<const double*>(scale_c->data_ptr()) : nullptr,
                         .clean_lse = clean_c.has_value() ? static_cast<const double*>(clean_c->data_ptr()) : nullptr,
                         .cap = cap.value_or(0),
                         .lse = nullptr,
                         .change = nullptr,
                         .picked = static_cast<double*>(picked.data_ptr()),
                         .pairs = P,
                         .positions = T,
                         .vocabulary = V,
                         .rank = r,
                         .groups = G,
                         .choices = K,
                         .splits = 0,
                         .columns_a_split = 0};
  switch (base.scalar_type()) {
    case ScalarType::Float:
      launch<float, float>(s, base, lse, change);
      break;
    case ScalarType::Double:
      launch<double, double>(s, base, lse, change);
      break;
    case ScalarType::BFloat16:
      launch<float, __nv_bfloat16>(s, base, lse, change);
      break;
    default:
      STD_TORCH_CHECK(false, "base has an unsupported dtype; expected float32, float64 or bfloat16");
  }
  return {lse, picked, change};
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("sweep_nll", TORCH_BOX(&fc::cuda::sweep_nll)); }
