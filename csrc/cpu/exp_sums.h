// Sums of exponentials of rows of logits that come a panel at a time.
#pragma once

#include <cmath>
#include <limits>

#include "exp.h"

namespace fc::cpu::FC_TIER {

// Exponents are taken from a row's reference value, raised only when a logit exceeds it by this much: sums stay far
// from overflow and the exp of a logit near the maximum loses nothing.
inline constexpr double kSlack = 8;

template <class T>
struct ExpSum {
  T reference = std::numeric_limits<T>::lowest();
  double total = 0;
};

// A logit is above the slack, or NaN: raises the reference, rescales the total and returns the factor for what has not
// joined it yet.
template <class T>
[[gnu::noinline]] static T raise(ExpSum<T>& row, const T* logits, int64_t count) {
  T highest = row.reference;
  for (int64_t j = 0; j < count; ++j) {
    if (logits[j] != logits[j]) row.total = std::numeric_limits<double>::quiet_NaN();
    if (logits[j] > highest) highest = logits[j];
  }
  const double factor = std::exp(static_cast<double>(row.reference) - static_cast<double>(highest));
  row.total *= factor;
  row.reference = highest;
  return static_cast<T>(factor);
}

// Makes the columns from `here` on -inf. scratch: room for the panel.
template <class T>
static inline void end_at(int64_t here, Vec<T> (&x)[kVectors], T* scratch) {
  for (int j = 0; j < kVectors; ++j) store(scratch + j * kLanes<T>, x[j]);
  for (int64_t j = here; j < kColumns<T>; ++j) scratch[j] = -std::numeric_limits<T>::infinity();
  for (int j = 0; j < kVectors; ++j) x[j] = load(scratch + j * kLanes<T>);
}

// Adds the exponentials of a panel's logits to `lanes`. scratch: room for the panel. count: of its columns, those past
// which are -inf.
template <class T>
[[gnu::always_inline]] static inline void add_exponentials(ExpSum<T>& row, Vec<T>& lanes, const Vec<T> (&x)[kVectors],
                                                           T* scratch, int64_t count) {
  if (any_above(x, broadcast<T>(row.reference + T(kSlack)))) {
    for (int j = 0; j < kVectors; ++j) store(scratch + j * kLanes<T>, x[j]);
    lanes *= raise<T>(row, scratch, count);
  }
  const Vec<T> reference = broadcast<T>(row.reference);
  Vec<T> added = exponential<T>(x[0] - reference);
  for (int j = 1; j < kVectors; ++j) added += exponential<T>(x[j] - reference);
  lanes += added;
}

// Adds the exponential of one logit.
static inline void add_one(ExpSum<double>& row, double x) {
  if (!(x <= row.reference + kSlack)) raise<double>(row, &x, 1);
  row.total += std::exp(x - row.reference);
}

template <class T>
static inline void join(ExpSum<T>& row, Vec<T> lanes) {
  if (row.reference < std::numeric_limits<T>::infinity()) row.total += sum<T>(lanes);
}

template <class T>
static inline double logarithm(const ExpSum<T>& row) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (row.reference == std::numeric_limits<T>::infinity()) return row.total == row.total ? infinity : row.total;
  if (row.total < 0.5) return -infinity;  // the maximum alone counts 1: every logit is -inf
  return static_cast<double>(row.reference) + std::log(row.total);
}

template <class T>
static inline Vec<T> capped(Vec<T> x, double cap) {
  return static_cast<T>(cap) * hyperbolic_tangent<T>(x / static_cast<T>(cap));
}

}  // namespace fc::cpu::FC_TIER
