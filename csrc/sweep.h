// What every backend of the ops on logits base + delta @ basis[group] checks before it looks at data.
#pragma once

#include "check.h"

namespace fc {

inline Sizes check_sweep(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& group,
                         const std::optional<Tensor>& outer = std::nullopt) {
  Sizes sizes;
  sizes("base", base, "T V");
  sizes("delta", delta, "P T r");
  sizes("basis", basis, outer.has_value() ? "1 d V" : "G r V");
  sizes("outer", outer, "G r d");
  sizes("group", group, "P", ScalarType::Long);
  check_dtypes("base, delta and basis", {base, delta, basis});
  if (outer.has_value()) check_dtypes("outer and base", {*outer, base});
  return sizes;
}

inline Sizes check_nll(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& tokens,
                       const Tensor& group, const std::optional<Tensor>& clean_lse, std::optional<double> cap,
                       const std::optional<Tensor>& outer = std::nullopt) {
  STD_TORCH_CHECK(!cap.has_value() || *cap > 0, "cap is ", cap.value_or(0), ", expected a positive number");
  Sizes sizes = check_sweep(base, delta, basis, group, outer);
  sizes("tokens", tokens, "T K", ScalarType::Long);
  sizes("clean_lse", clean_lse, "T");
  return sizes;
}

}  // namespace fc
