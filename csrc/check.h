// Checks of an op's arguments that name the argument and the value. The Python layer says the same in ValueErrors and
// IndexErrors before it calls; these hold for callers of torch.ops.pyfastcircuits. Every backend makes them before it
// looks at data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Throws the message alone: users need no file or function of ours. It is put together only if the condition fails.
#define FC_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::fc::joined(__VA_ARGS__))

namespace fc {

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline void check_dtypes(const char* names, std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors)
    FC_CHECK(x.scalar_type() == tensors.begin()->scalar_type(), names, " differ in dtype");
}

// The sizes of an op's dimensions, by name. `sizes("q", q, "B H T r")` learns the sizes that are new and holds the
// tensor to those that are known; "1" or "2" stands for itself. All tensors have to lie on the first one's device.
class Sizes {
 public:
  void operator()(const char* argument, const Tensor& x, const std::string& shape,
                  std::optional<ScalarType> dtype = std::nullopt) {
    std::istringstream words(shape);
    const std::vector<std::string> names{std::istream_iterator<std::string>(words), {}};
    for (const std::string& name : names)
      if (name[0] <= '9') known.try_emplace(name, std::stoll(name));
    bool fits = x.dim() == static_cast<int64_t>(names.size());
    for (int64_t i = 0; i < x.dim() && x.dim() == static_cast<int64_t>(names.size()); ++i)
      fits &= known.try_emplace(names[static_cast<size_t>(i)], x.size(i)).first->second == x.size(i);
    FC_CHECK(fits, argument, " has shape ", shape_of(x), ", expected ", expected(names));
    FC_CHECK(!dtype.has_value() || x.scalar_type() == *dtype, argument, " must be ",
             dtype == ScalarType::Long     ? "int64"
             : dtype == ScalarType::Double ? "float64"
                                           : "bool");
    if (!first.has_value()) first = x, first_name = argument;
    FC_CHECK(x.device() == first->device(), argument, " is not on ", first_name, "'s device");
  }

  void operator()(const char* argument, const std::optional<Tensor>& x, const std::string& shape,
                  std::optional<ScalarType> dtype = std::nullopt) {
    if (x.has_value()) (*this)(argument, *x, shape, dtype);
  }

  // Of a dimension that some tensor has.
  int64_t operator[](const char* name) const { return known.at(name); }

 private:
  // The shape in numbers, or in names while some of its sizes are unknown.
  std::string expected(const std::vector<std::string>& names) const {
    bool all = true;
    for (const std::string& name : names) all &= known.count(name) > 0;
    std::string out = "[";
    for (const std::string& name : names)
      out += (out.size() > 1 ? ", " : "") + (all ? std::to_string(known.at(name)) : name);
    return out + "]";
  }

  std::map<std::string, int64_t> known;
  std::optional<Tensor> first;
  const char* first_name = "";
};

// Of the ops on A @ B.
inline Sizes check_product(const Tensor& A, const Tensor& B) {
  Sizes sizes;
  sizes("A", A, "N r");
  FC_CHECK(B.dim() != 2 || B.size(0) == A.size(1), "A has shape ", shape_of(A), " and B ", shape_of(B),
           ": their inner dimensions r differ");
  sizes("B", B, "r M");
  check_dtypes("A and B", {A, B});
  return sizes;
}

// Of the ops on logits base + delta @ basis[group].
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
  FC_CHECK(!cap.has_value() || *cap > 0, "cap is ", cap.value_or(0), ", expected a positive number");
  Sizes sizes = check_sweep(base, delta, basis, group, outer);
  sizes("tokens", tokens, "T K", ScalarType::Long);
  sizes("clean_lse", clean_lse, "T");
  return sizes;
}

}  // namespace fc
