// What every backend of the ops on A @ B checks before it looks at data.
#pragma once

#include "check.h"

namespace fc {

inline Sizes check_product(const Tensor& A, const Tensor& B) {
  Sizes sizes;
  sizes("A", A, "N r");
  STD_TORCH_CHECK(B.dim() != 2 || B.size(0) == A.size(1), "A has shape ", shape_of(A), " and B ", shape_of(B),
                  ": their inner dimensions r differ");
  sizes("B", B, "r M");
  check_dtypes("A and B", {A, B});
  return sizes;
}

}  // namespace fc
