// Checks of an op's arguments that name the argument and the value. The Python layer says the same in ValueErrors and
// IndexErrors before it calls; these hold for callers of torch.ops.pyfastcircuits.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline void check_dtypes(const char* names, std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors)
    STD_TORCH_CHECK(x.scalar_type() == tensors.begin()->scalar_type(), names, " differ in dtype");
}

// The sizes of an op's dimensions, by name. `sizes("q", q, "B H T r")` learns the sizes that are new and holds the
// tensor to those that are known; "1" or "2" stands for itself. All tensors have to lie on the first one's device.
class Sizes {
 public:
  void operator()(const char* argument, const Tensor& x, const std::string& shape,
                  std::optional<ScalarType> dtype = std::nullopt) {
    const std::vector<std::string> names = split(shape);
    bool fits = x.dim() == static_cast<int64_t>(names.size());
    for (int64_t i = 0; i < x.dim() && x.dim() == static_cast<int64_t>(names.size()); ++i) {
      const std::string& name = names[static_cast<size_t>(i)];
      if (find(name) < 0) known.emplace_back(name, x.size(i));
      fits &= find(name) == x.size(i);
    }
    STD_TORCH_CHECK(fits, argument, " has shape ", shape_of(x), ", expected ", expected(names));
    STD_TORCH_CHECK(!dtype.has_value() || x.scalar_type() == *dtype, argument, " must be ",
                    dtype == ScalarType::Long     ? "int64"
                    : dtype == ScalarType::Double ? "float64"
                                                  : "bool");
    if (!first.has_value()) first = x, first_name = argument;
    STD_TORCH_CHECK(x.device() == first->device(), argument, " is not on ", first_name, "'s device");
  }

  void operator()(const char* argument, const std::optional<Tensor>& x, const std::string& shape,
                  std::optional<ScalarType> dtype = std::nullopt) {
    if (x.has_value()) (*this)(argument, *x, shape, dtype);
  }

  // Of a dimension that some tensor has.
  int64_t operator[](const char* name) const { return find(name); }

 private:
  static std::vector<std::string> split(const std::string& shape) {
    std::istringstream words(shape);
    return {std::istream_iterator<std::string>(words), {}};
  }

  // -1: not yet known.
  int64_t find(const std::string& name) const {
    for (const auto& [at, size] : known)
      if (at == name) return size;
    return name[0] <= '9' ? std::atoll(name.c_str()) : -1;
  }

  // The shape in numbers, or in names while some of its sizes are unknown.
  std::string expected(const std::vector<std::string>& names) const {
    bool all = true;
    for (const std::string& name : names) all &= find(name) >= 0;
    std::string out = "[";
    for (const std::string& name : names)
      out += (out.size() > 1 ? ", " : "") + (all ? std::to_string(find(name)) : name);
    return out + "]";
  }

  std::vector<std::pair<std::string, int64_t>> known;
  std::optional<Tensor> first;
  const char* first_name = "";
};

}  // namespace fc
