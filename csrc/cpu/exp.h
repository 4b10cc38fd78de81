// exp and tanh of a vector. For x in [log(min normal), 88] (fp32) or [.., 709] (fp64) the relative error is at
// most 1.5e-7 (fp32) or 4e-16 (fp64); below, -inf included, the result is a number under 2e-38 (3e-308). NaN and larger
// x are the caller's to keep out. Coefficients: minimax for e^f on |f| <= ln(2)/2. Near zero, exp(x) - 1 is made by
// polynomials of its own, right to a few units in its last place.
#pragma once

#include "simd.h"

namespace fc::cpu::FC_TIER {

template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147182f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLowest = -87.3f;
  static constexpr int kMantissa = 23;
  static constexpr float kPolynomial[] = {0.0014061277f, 0.008379021f, 0.041664776f, 0.16666365f, 0.5f, 1.0f, 1.0f};
  static constexpr float kLess1[] = {0.00833834f, 0.041872803f, 0.16666828f, 0.499994f, 1.0f};
};

template <>
struct ExpTraits<double> {
  static constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.69314718055994531;
  static constexpr double kLn2High = 0.6931471803691238, kLn2Low = 1.9082149292705877e-10;
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
  static constexpr double kLess1[] = {1.7703367639214006e-9, 2.514162345854208e-8,  2.7575195988535498e-7,
                                      2.7557138021523431e-6, 2.4801551008358365e-5, 1.9841270001657426e-4,
                                      1.3888888921040301e-3, 8.3333333332754187e-3, 4.1666666666550597e-2,
                                      0.16666666666666725,   0.50000000000000117,   1.0};
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

// The largest |x| of which less_1 makes exp(x) - 1 without splitting x: ln(2)/2, rounded up.
inline constexpr double kSmall = 0.3466;

// (exp(x) - 1) / x for |x| <= kSmall: relative error 4.6e-7 (fp32, degree 4) or 5e-17 (fp64, degree 11), minimax.
template <class T>
static inline Vec<T> less_1(Vec<T> x) {
  using C = ExpTraits<T>;
  Vec<T> p = broadcast<T>(C::kLess1[0]);
  constexpr int terms = static_cast<int>(sizeof(C::kLess1) / sizeof(T));
#pragma GCC unroll 16
  for (int i = 1; i < terms; ++i) p = p * x + C::kLess1[i];
  return p;
}

// exp(x) as 2^n exp(rest).
template <class T>
struct Split {
  Vec<T> power, rest;  // 2^n, and what is at most ln(2)/2 away from 0
};

// For |x| <= 80 (fp32) or 700 (fp64).
template <class T>
static inline Split<T> split(Vec<T> x) {
  using C = ExpTraits<T>;
  using I = typename Simd<T>::I;
  const Vec<T> shifted = x * C::kLog2e + C::kRound;
  return {(Vec<T>)((I)broadcast<T>(1) + ((I)shifted << C::kMantissa)), x - (shifted - C::kRound) * C::kLn2};
}

template <class T>
static inline Vec<T> magnitude(Vec<T> x) {
  using I = typename Simd<T>::I;
  return (Vec<T>)((I)x & ~I{} >> 1);
}

}  // namespace fc::cpu::FC_TIER
