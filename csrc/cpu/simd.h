// The vectors of one tier, as GCC/Clang vector extensions: arithmetic is written with operators and contracts to fused
// multiply-adds where the tier has them; intrinsics only where operators have no word for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fc::cpu::FC_TIER {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRows = 8;  // 8 rows x 3 vectors: 24 accumulators of 32 registers
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRows = 4;  // 12 accumulators of 16 registers
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRows = 3;
#endif
inline constexpr int kVectors = 3;  // rows divide the columns of a panel, for every type

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t I __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t I __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kColumns = kVectors * kLanes<T>;  // of one packed panel

template <class T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
static inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
// Stores past the caches what is not read soon; p is aligned. drain() before another thread reads it.
template <class T>
static inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}
static inline void drain() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
// Keeps the compiler from loading x again at each of its uses.
template <class V>
static inline void in_register([[maybe_unused]] V& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#endif
}
// Over all lanes, halves added to halves: fewer roundings, shorter chains.
template <class T>
static inline T sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
#else
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Lanes of a and b in turn, the first half of them and the second.
template <class T, int... I>
static inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, I...>) {
  low = __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + I / 2 + kLanes<T> / 2)...);
}
// A square of vectors, rows for columns.
template <class T>
static inline void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      interleave<T>(v[i], v[i + n / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, n>{});
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = next[i];
  }
}
// Lanes of a where bit kBit of the lane's number is clear and of b where it is set, each with the lane across that bit.
template <class T, int kBit, int... I>
static inline Vec<T> add_across(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>;
  return __builtin_shufflevector(a, b, (I & kBit ? I + n : I)...) +
         __builtin_shufflevector(a, b, (I & kBit ? (I ^ kBit) + n : I ^ kBit)...);
}
// The sums of kCount vectors, a power of two of at most as many as there are lanes, in the first lanes.
template <class T, int kCount, int kBit = 1>
static inline Vec<T> sums(const Vec<T>* v) {
  constexpr bool paired = kBit < kCount;  // else one vector is left, its lanes alike but for the higher bits
  constexpr int count = paired ? kCount / kBit / 2 : 1;
  if constexpr (kBit == kLanes<T>) {
    return v[0];
  } else {
    Vec<T> folded[count];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      folded[i] = add_across<T, kBit>(v[2 * i], v[2 * i + paired], std::make_integer_sequence<int, kLanes<T>>{});
    return sums<T, kCount, 2 * kBit>(folded);
  }
}

// The larger of the two; x where either is NaN.
static inline Vec<float> at_least(Vec<float> x, Vec<float> floor) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)floor, (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)floor, (__m256)x);
#else
  return floor > x ? floor : x;
#endif
}
static inline Vec<double> at_least(Vec<double> x, Vec<double> floor) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)floor, (__m512d)x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd((__m256d)floor, (__m256d)x);
#else
  return floor > x ? floor : x;
#endif
}

// Whether any lane is above the bound or NaN.
static inline bool any_above(const Vec<float> (&x)[kVectors], Vec<float> bound) {
#if defined(__AVX512F__)
  auto below = _mm512_cmp_ps_mask((__m512)x[0], (__m512)bound, _CMP_LE_OQ);
  for (int j = 1; j < kVectors; ++j) below = _mm512_mask_cmp_ps_mask(below, (__m512)x[j], (__m512)bound, _CMP_LE_OQ);
  return !_kortestc_mask16_u8(below, below);
#elif defined(__AVX2__)
  const auto mask = [&](int j) { return _mm256_cmp_ps((__m256)x[j], (__m256)bound, _CMP_NLE_UQ); };
  return _mm256_movemask_ps(_mm256_or_ps(mask(0), _mm256_or_ps(mask(1), mask(2)))) != 0;
#else
  const auto fine = (x[0] <= bound) & (x[1] <= bound) & (x[2] <= bound);
  bool all = true;
  for (int i = 0; i < kLanes<float>; ++i) all &= fine[i] != 0;
  return !all;
#endif
}
static inline bool any_above(const Vec<double> (&x)[kVectors], Vec<double> bound) {
#if defined(__AVX512F__)
  auto below = _mm512_cmp_pd_mask((__m512d)x[0], (__m512d)bound, _CMP_LE_OQ);
  for (int j = 1; j < kVectors; ++j) below = _mm512_mask_cmp_pd_mask(below, (__m512d)x[j], (__m512d)bound, _CMP_LE_OQ);
  return !_kortestc_mask8_u8(below, below);
#elif defined(__AVX2__)
  const auto mask = [&](int j) { return _mm256_cmp_pd((__m256d)x[j], (__m256d)bound, _CMP_NLE_UQ); };
  return _mm256_movemask_pd(_mm256_or_pd(mask(0), _mm256_or_pd(mask(1), mask(2)))) != 0;
#else
  const auto fine = (x[0] <= bound) & (x[1] <= bound) & (x[2] <= bound);
  bool all = true;
  for (int i = 0; i < kLanes<double>; ++i) all &= fine[i] != 0;
  return !all;
#endif
}

// One bit for each lane that is above the bound: bit j kLanes + i of lane i of x[j]. NaN on either side counts as above
// with kOrNan.
template <bool kOrNan>
static inline uint64_t lanes_above(const Vec<float> (&x)[kVectors], Vec<float> bound) {
  uint64_t bits = 0;
  for (int j = 0; j < kVectors; ++j) {
#if defined(__AVX512F__)
    const uint64_t lanes = _mm512_cmp_ps_mask((__m512)x[j], (__m512)bound, kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
    const auto above = _mm256_cmp_ps((__m256)x[j], (__m256)bound, kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ);
    const auto lanes = static_cast<uint64_t>(_mm256_movemask_ps(above));
#else
    uint64_t lanes = 0;
    for (int i = 0; i < kLanes<float>; ++i)
      lanes |= static_cast<uint64_t>(kOrNan ? !(x[j][i] <= bound[i]) : x[j][i] > bound[i]) << i;
#endif
    bits |= lanes << (j * kLanes<float>);
  }
  return bits;
}
template <bool kOrNan>
static inline uint64_t lanes_above(const Vec<double> (&x)[kVectors], Vec<double> bound) {
  uint64_t bits = 0;
  for (int j = 0; j < kVectors; ++j) {
#if defined(__AVX512F__)
    const uint64_t lanes = _mm512_cmp_pd_mask((__m512d)x[j], (__m512d)bound, kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
    const auto above = _mm256_cmp_pd((__m256d)x[j], (__m256d)bound, kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ);
    const auto lanes = static_cast<uint64_t>(_mm256_movemask_pd(above));
#else
    uint64_t lanes = 0;
    for (int i = 0; i < kLanes<double>; ++i)
      lanes |= static_cast<uint64_t>(kOrNan ? !(x[j][i] <= bound[i]) : x[j][i] > bound[i]) << i;
#endif
    bits |= lanes << (j * kLanes<double>);
  }
  return bits;
}

}  // namespace fc::cpu::FC_TIER
