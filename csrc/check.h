// Checks that name the argument and the value. The Python layer says the same in ValueErrors and IndexErrors before it
// calls; these hold for callers of torch.ops.pyfastcircuits.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace fc {

using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

#define FC_CHECK_SHAPE(tensor, expected)                                                                           \
  STD_TORCH_CHECK(::fc::has_shape(tensor, expected), #tensor " has shape ", ::fc::shape_of(tensor), ", expected ", \
                  ::fc::shape_text(expected))

using Shape = std::initializer_list<int64_t>;

inline bool has_shape(const Tensor& t, Shape expected) {
  if (t.dim() != static_cast<int64_t>(expected.size())) return false;
  int64_t i = 0;
  for (const int64_t size : expected)
    if (t.size(i++) != size) return false;
  return true;
}

inline std::string shape_text(Shape expected) {
  std::string out = "[";
  for (const int64_t size : expected) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
  return out + "]";
}

}  // namespace fc
