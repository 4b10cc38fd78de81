// Tensors as kernels take them. For the torch-facing halves of all backends.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "check.h"

namespace fc {

inline Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}
inline std::optional<Tensor> contiguous_as(const std::optional<Tensor>& x, ScalarType dtype) {
  return x.has_value() ? std::optional(contiguous_as(*x, dtype)) : std::nullopt;
}

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* data_of(const std::optional<Tensor>& x) {
  return x.has_value() ? data_of<T>(*x) : nullptr;
}

// The dtype of results that are no sums over many logits: the arguments', but fp32 for bfloat16.
inline ScalarType result_dtype(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fc
