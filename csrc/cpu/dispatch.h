// How the torch-facing half of an op reaches its kernels, given the arithmetic asked for and the tier in force.
#pragma once

#include <cstdint>

namespace fc::cpu {

template <int N>
struct Strided {  // a tensor of N dimensions as kernels see it; data is null where there is none
  void* data;
  int64_t stride[N];

  template <class T>
  const T* at(int64_t i) const {  // what has the first index i
    return static_cast<const T*>(data) + i * stride[0];
  }
};

// The type of the inputs, and how they are multiplied; "by_bf16": both factors are rounded to bfloat16 first.
enum class Arithmetic { fp32, fp64, bf16_inputs, fp32_by_bf16, bf16_by_bf16 };

}  // namespace fc::cpu

#ifdef FC_TIER

#include "tile.h"

namespace fc::cpu::FC_TIER {

// Which inputs an op multiplies by bfloat16 dot products, where the tier has them.
enum class Dots { none, fp32, all };

// Op<Scheme, Source>::kernels() of an arithmetic: what the torch-facing half calls. Null where the op or the tier has
// no such arithmetic. A tier of bfloat16 dot products has nothing else: the rest is that of the tier below it.
template <template <class Scheme, class Source> class Op, Dots kDots = Dots::all>
static auto select(Arithmetic arithmetic) -> decltype(Op<Ieee<float>, float>::kernels()) {
  switch (arithmetic) {
#if defined(FC_BF16_DOTS)
    case Arithmetic::fp32_by_bf16:
      if constexpr (kDots != Dots::none) return Op<Bf16Dot, float>::kernels();
      return nullptr;
    case Arithmetic::bf16_by_bf16:
      if constexpr (kDots == Dots::all) return Op<Bf16Dot, BFloat16>::kernels();
      return nullptr;
#else
    case Arithmetic::fp32:
      return Op<Ieee<float>, float>::kernels();
    case Arithmetic::fp64:
      return Op<Ieee<double>, double>::kernels();
    case Arithmetic::bf16_inputs:
      return Op<Ieee<float>, BFloat16>::kernels();
#endif
    default:
      return nullptr;
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../plan.h"
#include "../tensors.h"
#include "caches.h"
#include "tasks.h"

// Declares `Result name(Argument)` of every tier, and pick_name(argument), which calls the one of the tier in force, or
// of the tier that it adds to. To be used in namespace fc::cpu.
#define FC_DECLARE_OF_TIER(tier, Result, name, Argument) \
  namespace tier {                                       \
  Result name(Argument);                                 \
  }
#define FC_CASE_OF_TIER(tier, name) \
  case Tier::tier:                  \
    return tier::name(argument);
#define FC_TIERS(Result, name, Argument)                              \
  FC_FOR_EACH_TIER(FC_DECLARE_OF_TIER, Result, name, Argument)        \
  static Result name##_of(Tier tier, Argument argument) {             \
    switch (tier) {                                                   \
      FC_FOR_EACH_TIER(FC_CASE_OF_TIER, name)                         \
      default:                                                        \
        fail("this build has no code for the tier in force");         \
    }                                                                 \
  }                                                                   \
  static Result pick_##name(Argument argument) {                      \
    const Tier tier = current_tier();                                 \
    Result own = name##_of(tier, argument);                           \
    return own == nullptr ? name##_of(base_of(tier), argument) : own; \
  }

namespace fc::cpu {

template <int N>
Strided<N> strided(const Tensor& x) {
  Strided<N> out{x.data_ptr(), {}};
  for (int i = 0; i < N; ++i) out.stride[i] = x.stride(i);
  return out;
}

// Of an argument that Sizes has found to be of a dtype that is computed in.
inline Arithmetic arithmetic_of(const char* name, const Tensor& argument, bool rounded = false) {
  switch (argument.scalar_type()) {
    case ScalarType::BFloat16:
      return rounded ? Arithmetic::bf16_by_bf16 : Arithmetic::bf16_inputs;
    case ScalarType::Double:
      FC_CHECK(!rounded, "precision is 'bf16' but ", name, " is float64; pass float32 or bfloat16");
      return Arithmetic::fp64;
    default:
      return rounded ? Arithmetic::fp32_by_bf16 : Arithmetic::fp32;
  }
}

inline void check_instructions(bool found, const char* what) {
  FC_CHECK(found, what, "='bf16' needs a CPU with bfloat16 dot products; the tier in force is ",
           kTierNames[static_cast<int>(current_tier())]);
}

// The kernels, by one of the functions that FC_TIERS makes, that multiply the argument `name` in a precision.
template <class Kernels>
Kernels pick(Kernels (*pick_kernels)(Arithmetic), const char* name, const Tensor& argument,
             const std::string& precision) {
  const bool rounded = precision == "bf16";
  FC_CHECK(rounded || precision == "ieee", "precision is '", precision, "', expected 'ieee' or 'bf16' on the CPU");
  const Kernels kernels = pick_kernels(arithmetic_of(name, argument, rounded));
  check_instructions(kernels != nullptr, "precision");
  return kernels;
}

}  // namespace fc::cpu

#endif
