// sweep_nll on CUDA tensors: check, empty return, dispatch, launch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "launch.h"
#include "sweep_nll.cuh"

namespace fc::cuda {
namespace {

template <class T, class Source>
void launch(SweepArguments s, const Tensor& like, Tensor& lse, Tensor& change) {
  constexpr int64_t size = Tile<T>::kSize;
  const int64_t row_blocks = s.pairs * ceil_div(s.positions, size), tiles = ceil_div(s.vocabulary, size);
  s.splits = std::clamp<int64_t>(ceil_div(kBlocksWanted, row_blocks), 1, std::max<int64_t>(tiles, 1));
  s.columns_a_split = ceil_div(tiles, s.splits) * size;
  FC_CHECK(row_blocks * s.splits <= kMostBlocks, "delta has shape ", s.pairs, " x ", s.positions,
           ": too many rows for one launch; cut P");
  const auto scratch = [&] {
    return torch::stable::new_empty(like, {s.splits, s.pairs, s.positions}, ScalarType::Double);
  };
  const Tensor partial_lse = scratch(), partial_change = s.clean_lse ? scratch() : partial_lse;
  s.lse = data_of<double>(partial_lse);
  s.change = s.clean_lse ? data_of<double>(partial_change) : nullptr;
  start(sweep_nll_kernel<T, Source>, row_blocks * s.splits, like, s);
  start(sweep_nll_join, ceil_div(s.pairs * s.positions, kThreads), like, s, data_of<double>(lse),
        data_of<double>(change));
}

std::tuple<Tensor, Tensor, Tensor> sweep_nll(const Tensor& base, const Tensor& delta, const Tensor& basis,
                                             const Tensor& tokens, const Tensor& group,
                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& clean_lse,
                                             const std::string& precision, std::optional<double> cap,
                                             const std::optional<Tensor>& outer) {
  check_device();
  FC_CHECK(!outer.has_value(), "outer is given, but the CUDA kernel has none: multiply it out");
  Sizes sizes = check_nll(base, delta, basis, tokens, group, clean_lse, cap);
  sizes("scale", scale, "P T", Kind::number);
  const int64_t P = sizes["P"], T = sizes["T"], K = sizes["K"];
  FC_CHECK(precision == "ieee", "precision is '", precision, "', expected 'ieee' on the CUDA backend");
  const torch::stable::accelerator::DeviceGuard guard(base.get_device_index());

  Tensor lse = torch::stable::new_empty(base, {P, T}, ScalarType::Double);
  Tensor picked = torch::stable::new_zeros(base, {P, T, K}, ScalarType::Double);
  Tensor change = torch::stable::new_empty(base, {clean_lse.has_value() ? P : 0, T}, ScalarType::Double);
  if (P * T == 0) return {lse, picked, change};

  using torch::stable::contiguous;
  const Tensor base_c = contiguous(base), delta_c = contiguous(delta), basis_c = contiguous(basis);
  const Tensor tokens_c = contiguous(tokens), group_c = contiguous(group);
  const auto scale_c = contiguous_as(scale, ScalarType::Double), clean_c = contiguous_as(clean_lse, ScalarType::Double);
  const SweepArguments s{.base = base_c.data_ptr(),
                         .delta = delta_c.data_ptr(),
                         .basis = basis_c.data_ptr(),
                         .tokens = data_of<const int64_t>(tokens_c),
                         .group = data_of<const int64_t>(group_c),
                         .scale = data_of<const double>(scale_c),
                         .clean_lse = data_of<const double>(clean_c),
                         .cap = cap.value_or(0),
                         .picked = data_of<double>(picked),
                         .pairs = P,
                         .positions = T,
                         .vocabulary = sizes["V"],
                         .rank = sizes["r"],
                         .groups = sizes["G"],
                         .tokens_per_position = K};
  with_types(base, [&]<class Work, class Source>() { launch<Work, Source>(s, base, lse, change); });
  return {lse, picked, change};
}

}  // namespace
}  // namespace fc::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CUDA, m) { m.impl("sweep_nll", TORCH_BOX(&fc::cuda::sweep_nll)); }
