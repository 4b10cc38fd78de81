// Checks of an op's arguments that name the argument and the value. The Python layer says the same in ValueErrors and
// IndexErrors before it calls; these hold for callers of torch.ops.pyfastcircuits. Every backend makes them before it
// looks at data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cfloat>
#include <cstdio>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace fc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Words of a message. A stream would put them together too, but its locale is not to be trusted: where a compiler links
// libstdc++ into this module, beside the one that Python has loaded, writing a number crashes.
inline std::string word(const std::string& text) { return text; }
inline std::string word(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}
template <class Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
std::string word(Integer number) {
  return std::to_string(number);
}

// Throws what Python shows as a RuntimeError, with these words and nothing else: torch's own STD_TORCH_CHECK puts the
// function, the file and the line in front of them.
template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  throw std::runtime_error((std::string() + ... + word(words)));
}

// Fails with the words that follow the condition where it does not hold; otherwise they cost nothing.
#define FC_CHECK(condition, ...)               \
  do {                                         \
    if (!(condition)) ::fc::fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

// As Python writes it.
inline std::string name_of(ScalarType dtype) {
  static const std::map<ScalarType, std::string> others{{ScalarType::Byte, "uint8"},
                                                        {ScalarType::Char, "int8"},
                                                        {ScalarType::Short, "int16"},
                                                        {ScalarType::Int, "int32"},
                                                        {ScalarType::Long, "int64"},
                                                        {ScalarType::Half, "float16"},
                                                        {ScalarType::Float, "float32"},
                                                        {ScalarType::Double, "float64"},
                                                        {ScalarType::ComplexHalf, "complex32"},
                                                        {ScalarType::ComplexFloat, "complex64"},
                                                        {ScalarType::ComplexDouble, "complex128"}};
  const auto found = others.find(dtype);
  std::string name = found != others.end() ? found->second : torch::headeronly::toString(dtype);
  for (char& letter : name)
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  return "torch." + name;
}

// The same of a device.
inline std::string name_of(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  switch (device.type()) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda:" + std::to_string(device.index());
    case DeviceType::Meta:
      return "meta";
    default:
      return "another device";
  }
}

inline bool is_computed_in(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16;
}

// What an argument is made of. Factors have the dtype of the op's first argument, which is computed in; numbers are
// converted, and may have another.
enum class Kind { factor, number, float64, index, flag };

// The sizes of an op's dimensions, by name. `sizes("q", q, "B H T r")` learns the sizes that are new and holds the
// tensor to those that are known; "1" or "2" stands for itself. All tensors have to lie on the first one's device.
class Sizes {
 public:
  void operator()(const std::string& argument, const Tensor& x, const std::string& shape, Kind kind = Kind::factor) {
    std::vector<std::string> names(1);
    for (const char letter : shape) letter == ' ' ? names.emplace_back() : names.back() += letter;
    for (const std::string& name : names)
      if (name[0] <= '9') known.try_emplace(name, std::stoll(name));
    bool fits = x.dim() == static_cast<int64_t>(names.size());
    for (int64_t i = 0; i < x.dim() && x.dim() == static_cast<int64_t>(names.size()); ++i)
      fits &= known.try_emplace(names[static_cast<size_t>(i)], x.size(i)).first->second == x.size(i);
    FC_CHECK(fits, argument, " has shape ", shape_of(x), ", expected ", expected(names));
    check_elements(argument, x, kind);
  }

  void operator()(const std::string& argument, const std::optional<Tensor>& x, const std::string& shape,
                  Kind kind = Kind::factor) {
    if (x.has_value()) (*this)(argument, *x, shape, kind);
  }

  // Holds a tensor of any shape to the first one's device, and to what its kind is made of.
  void check_elements(const std::string& argument, const Tensor& x, Kind kind = Kind::factor) {
    if (!first.has_value()) first = x, first_name = argument;
    FC_CHECK(x.device() == first->device(), argument, " is on ", name_of(x.device()), ", but ", first_name, " is on ",
             name_of(first->device()));
    const ScalarType dtype = x.scalar_type();
    const auto expect = [&](bool right, const std::string& wanted) {
      FC_CHECK(right, argument, " has dtype ", name_of(dtype), wanted);
    };
    if (kind == Kind::index) return expect(dtype == ScalarType::Long, ", expected torch.int64");
    if (kind == Kind::flag) return expect(dtype == ScalarType::Bool, ", expected torch.bool");
    if (kind == Kind::float64) return expect(dtype == ScalarType::Double, ", expected torch.float64");
    const bool factor = is_computed_in(dtype);
    if (kind == Kind::number)
      return expect(factor || dtype == ScalarType::Half,
                    ", expected torch.float32, torch.float64, torch.bfloat16 or torch.float16");
    expect(dtype == first->scalar_type(), ", but " + first_name + " has " + name_of(first->scalar_type()));
    expect(factor, ", expected torch.float32, torch.float64 or torch.bfloat16");
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
  std::string first_name;
};

// What logits or scores are multiplied or divided by, in float32 for most dtypes.
inline void check_positive(const char* argument, double value) {
  FC_CHECK(value >= FLT_MIN && value <= FLT_MAX, argument, " is ", value,
           ", expected a positive number that float32 holds");
}

// Indices from 0 to size - 1. width: 0 for a list; where pairs or more stand in a row, how many.
inline void check_indices(const char* argument, const int64_t* values, int64_t count, int64_t size, int64_t width = 0) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= 0 && values[i] < size) continue;
    const std::string place =
        width > 0 ? std::to_string(i / width) + ", " + std::to_string(i % width) : std::to_string(i);
    fail(argument, "[", place, "] is ", values[i], ", expected 0 to ", size - 1);
  }
}

// Of the ops on A @ B.
inline Sizes check_product(const Tensor& A, const Tensor& B) {
  Sizes sizes;
  sizes("A", A, "N r");
  FC_CHECK(B.dim() != 2 || B.size(0) == A.size(1), "A has shape ", shape_of(A), " and B ", shape_of(B),
           ": their inner dimensions r differ");
  sizes("B", B, "r M");
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
  sizes("group", group, "P", Kind::index);
  FC_CHECK(sizes["G"] > 0 || sizes["P"] == 0, outer.has_value() ? "outer" : "basis", " has shape ",
           shape_of(outer.has_value() ? *outer : basis), ": no groups");
  return sizes;
}

inline Sizes check_effects(const Tensor& base, const Tensor& delta, const Tensor& basis, const Tensor& tokens,
                           const Tensor& group, const Tensor& clean_lse, std::optional<double> cap,
                           const std::optional<Tensor>& outer = std::nullopt) {
  if (cap.has_value()) check_positive("cap", *cap);
  Sizes sizes = check_sweep(base, delta, basis, group, outer);
  sizes("tokens", tokens, "T K", Kind::index);
  sizes("clean_lse", clean_lse, "T", Kind::number);
  return sizes;
}

}  // namespace fc
