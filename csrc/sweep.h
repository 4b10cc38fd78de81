// What every backend of the ops on base + delta @ basis[group] checks before it looks at data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "check.h"

namespace fc {

struct ChangeSizes {
  int64_t pairs, positions, vocabulary, rank, groups;
};

inline ChangeSizes check_changes(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& tokens,
                                 const Tensor& group, const std::optional<Tensor>& outer = std::nullopt) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(base.dim() == 2, "base has shape ", shape_of(base), ", expected [T, V]");
  STD_TORCH_CHECK(delta.dim() == 3, "delta has shape ", shape_of(delta), ", expected [P, T, r]");
  STD_TORCH_CHECK(basis.dim() == 3, "basis has shape ", shape_of(basis), ", expected [G, r, V]");
  STD_TORCH_CHECK(!outer.has_value() || outer->dim() == 3, "outer has shape ", shape_of(*outer),
                  ", expected [G, r, d]");
  const int64_t T = base.size(0), V = base.size(1), P = delta.size(0), r = delta.size(2);
  const int64_t G = outer.has_value() ? outer->size(0) : basis.size(0);
  FC_CHECK_SHAPE(delta, (Shape{P, T, r}));
  if (outer.has_value()) {
    FC_CHECK_SHAPE(*outer, (Shape{G, r, basis.size(1)}));
    STD_TORCH_CHECK(outer->scalar_type() == base.scalar_type(), "outer and base differ in dtype");
    STD_TORCH_CHECK(outer->device() == base.device(), "outer is not on base's device");
  }
  FC_CHECK_SHAPE(basis, (outer.has_value() ? Shape{1, basis.size(1), V} : Shape{G, r, V}));
  FC_CHECK_SHAPE(group, (Shape{P}));
  STD_TORCH_CHECK(delta.scalar_type() == base.scalar_type() && basis.scalar_type() == base.scalar_type(),
                  "base, delta and basis differ in dtype");
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && group.scalar_type() == ScalarType::Long,
                  "tokens and group must be int64");
  const auto device = base.device();
  STD_TORCH_CHECK(
      delta.device() == device && basis.device() == device && tokens.device() == device && group.device() == device,
      "the tensors are not all on base's device");
  return {P, T, V, r, G};
}

struct SweepSizes {
  int64_t pairs, positions, vocabulary, rank, groups, choices;
};

inline SweepSizes check_sweep(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& tokens,
                              const Tensor& group, const std::optional<Tensor>& scale,
                              const std::optional<Tensor>& clean_lse, std::optional<double> cap,
                              const std::optional<Tensor>& outer = std::nullopt) {
  STD_TORCH_CHECK(!cap.has_value() || *cap > 0, "cap is ", cap.value_or(0), ", expected a positive number");
  STD_TORCH_CHECK(tokens.dim() == 2, "tokens has shape ", shape_of(tokens), ", expected [T, K]");
  const auto [P, T, V, r, G] = check_changes(base, delta, basis, tokens, group, outer);
  const int64_t K = tokens.size(1);
  FC_CHECK_SHAPE(tokens, (Shape{T, K}));
  if (scale.has_value()) FC_CHECK_SHAPE(*scale, (Shape{P, T}));
  if (clean_lse.has_value()) FC_CHECK_SHAPE(*clean_lse, (Shape{T}));
  STD_TORCH_CHECK((!scale.has_value() || scale->device() == base.device()) &&
                      (!clean_lse.has_value() || clean_lse->device() == base.device()),
                  "the tensors are not all on base's device");
  return {P, T, V, r, G, K};
}

}  // namespace fc
