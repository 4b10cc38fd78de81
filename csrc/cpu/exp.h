// exp and tanh of a vector. For x in [log(min normal), 88] (fp32) or [.., 709] (fp64) the relative error is at
// most 1.5e-7 (fp32) or 4e-16 (fp64); below, -inf included, the result is a number under 2e-38 (3e-308). NaN and larger
// x are the caller's to keep out. Coefficients: minimax for e^f on |f| <= ln(2)/2.
#pragma once

#include "simd.h"

namespace fc::cpu::FC_TIER {

template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLowest = -87.3f;
  static constexpr int kMantissa = 23;
  static constexpr float kPolynomial[] = {0.0014061277f, 0.008379021f, 0.041664776f, 0.16666365f, 0.5f, 1.0f, 1.0f};
};

template <>
struct ExpTraits<double> {
  static constexpr double kLog2e = 1.4426950408889634, kLn2High = 0.6931471803691238, kLn2Low = 1.9082149292705877e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -708.3;
  static constexpr int kMantissa = 52;
  static constexpr double kPolynomial[] = {2.4994298684329889e-8,
                                           2.76323081747208471e-7,
                                           2.75576226351942304e-6,
                                           2.4801486481428435e-5,
                                           1.98412694324534986e-4,
                                           1.38888889512610584e-3,
                                           8.33333333355944249e-3,
                                           4.16666666664926296e-2,
                                           1.66666666666661682e-1,
                                           0.50000000000000177,
                                           1.0,
                                           1.0};
};

template <class T>
static inline Vec<T> exponential(Vec<T> x) {
  using C = ExpTraits<T>;
  x = at_least(x, broadcast<T>(C::kLowest));
  const Vec<T> shifted = x * C::kLog2e + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  Vec<T> f = x - n * C::kLn2High;
  f = f - n * C::kLn2Low;
  Vec<T> p = broadcast<T>(C::kPolynomial[0]);
  constexpr int terms = static_cast<int>(sizeof(C::kPolynomial) / sizeof(T));
#pragma GCC unroll 16
  for (int i = 1; i < terms; ++i) p = p * f + C::kPolynomial[i];
  using I = typename Simd<T>::I;
  return (Vec<T>)((I)p + ((I)shifted << C::kMantissa));
}

// tanh of a vector, right to a few units in the last place near 0 too; NaN stays NaN. By expm1, whose polynomial is
// that of exp without its last term.
template <class T>
static inline Vec<T> hyperbolic_tangent(Vec<T> x) {
  using C = ExpTraits<T>;
  using I = typename Simd<T>::I;
  const Vec<T> bound = broadcast<T>(20);  // tanh is 1 from there on
  x = -at_least(-at_least(x, -bound), -bound) * T(2);
  const Vec<T> shifted = x * C::kLog2e + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  Vec<T> f = x - n * C::kLn2High;
  f = f - n * C::kLn2Low;
  Vec<T> p = broadcast<T>(C::kPolynomial[0]);
  constexpr int terms = static_cast<int>(sizeof(C::kPolynomial) / sizeof(T));
#pragma GCC unroll 16
  for (int i = 1; i < terms - 1; ++i) p = p * f + C::kPolynomial[i];
  const Vec<T> power = (Vec<T>)((I)broadcast<T>(1) + ((I)shifted << C::kMantissa));
  const Vec<T> less_one = p * f * power + (power - T(1));
  return less_one / (less_one + T(2));
}

}  // namespace fc::cpu::FC_TIER
