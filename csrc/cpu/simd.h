// The vectors of one tier, as GCC/Clang vector extensions: arithmetic is written with operators and contracts to fused
// multiply-adds where the tier has them; intrinsics only where operators have no word for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FC_BF16_DOTS
#endif

#include "isa.h"

namespace fc::cpu::FC_TIER {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRows = 8;  // 8 rows x 3 vectors: 24 accumulators of 32 registers
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRows = 4;  // 12 accumulators of 16 registers
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kRows = 6;  // 18 accumulators of 32 registers
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
static_assert(kVectors * kVectorBytes == panel_bytes(Tier::FC_TIER) && kColumns<float> <= kWidestPanel);

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
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}
// Where registers are few, keeps the compiler from holding what lies at p in some of them from one use to the next.
template <class T>
static inline void read_again([[maybe_unused]] const T*& p) {
#if !defined(__AVX2__) && !defined(__aarch64__)
  asm("" : "+r"(p));
#endif
}
// The sum of all lanes. Halves are added to halves: a lane is rounded a few times instead of once for each lane.
template <class T>
static inline T sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    return vaddvq_f32((float32x4_t)v);
  else
    return vaddvq_f64((float64x2_t)v);
#else
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Interleaves a and b, lane by lane: `low` is made of the first halves of both, `high` of the second.
template <class T, int... I>
static inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, I...>) {
  low = __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + I / 2 + kLanes<T> / 2)...);
}
// Transposes a square of as many vectors as one has lanes.
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
// One step of a butterfly add. Every lane of a is added to the lane whose number differs from its own in bit kBit, and
// so is every lane of b; the lanes with that bit clear hold sums of a, those with it set sums of b.
template <class T, int kBit, int... I>
static inline Vec<T> add_across(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>;
  return __builtin_shufflevector(a, b, (I & kBit ? I + n : I)...) +
         __builtin_shufflevector(a, b, (I & kBit ? (I ^ kBit) + n : I ^ kBit)...);
}
// Adds up the lanes of each of kCount vectors by butterfly adds; lane i of the result is the sum of v[i]. kCount is a
// power of two and at most the number of lanes.
template <class T, int kCount, int kBit = 1>
static inline Vec<T> sums(const Vec<T>* v) {
  constexpr bool paired = kBit < kCount;  // else one vector is left, and is folded with itself
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
template <class V>
static inline V at_least(V x, V floor) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4)
    return (V)_mm512_max_ps((__m512)floor, (__m512)x);
  else
    return (V)_mm512_max_pd((__m512d)floor, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(x[0]) == 4)
    return (V)_mm256_max_ps((__m256)floor, (__m256)x);
  else
    return (V)_mm256_max_pd((__m256d)floor, (__m256d)x);
#else
  return floor > x ? floor : x;
#endif
}

// Compares lane by lane: a bit for each lane of x that is above the bound, or NaN on either side with kOrNan.
template <bool kOrNan, class V>
static inline uint64_t mask_above(V x, V bound) {
  [[maybe_unused]] constexpr bool kSingle = sizeof(x[0]) == 4;
#if defined(__AVX512F__)
  constexpr int kAbove = kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ;
  if constexpr (kSingle)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, kAbove);
  else
    return _mm512_cmp_pd_mask((__m512d)x, (__m512d)bound, kAbove);
#elif defined(__AVX2__)
  constexpr int kAbove = kOrNan ? _CMP_NLE_UQ : _CMP_GT_OQ;
  if constexpr (kSingle)
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)bound, kAbove)));
  else
    return static_cast<uint64_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, (__m256d)bound, kAbove)));
#elif defined(__aarch64__)
  const auto above = kOrNan ? ~(x <= bound) : x > bound;
  if constexpr (kSingle)
    return vaddvq_u32((uint32x4_t)above & uint32x4_t{1, 2, 4, 8});
  else
    return vaddvq_u64((uint64x2_t)above & uint64x2_t{1, 2});
#else
  uint64_t lanes = 0;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(x[0])); ++i)
    lanes |= static_cast<uint64_t>(kOrNan ? !(x[i] <= bound[i]) : x[i] > bound[i]) << i;
  return lanes;
#endif
}

// The same of a panel's row: bit j * kLanes + i stands for lane i of x[j].
template <bool kOrNan, class V>
static inline uint64_t lanes_above(const V (&x)[kVectors], V bound) {
  uint64_t bits = 0;
  for (int j = 0; j < kVectors; ++j)
    bits |= mask_above<kOrNan>(x[j], bound) << (j * kVectorBytes / static_cast<int>(sizeof(x[0][0])));
  return bits;
}

// Whether any lane of a panel's row is above the bound or NaN.
template <class V>
static inline bool any_above(const V (&x)[kVectors], V bound) {
  [[maybe_unused]] constexpr bool kSingle = sizeof(x[0][0]) == 4;
#if defined(__AVX512F__)
  if constexpr (kSingle) {
    auto below = _mm512_cmp_ps_mask((__m512)x[0], (__m512)bound, _CMP_LE_OQ);
    for (int j = 1; j < kVectors; ++j) below = _mm512_mask_cmp_ps_mask(below, (__m512)x[j], (__m512)bound, _CMP_LE_OQ);
    return !_kortestc_mask16_u8(below, below);
  } else {
    auto below = _mm512_cmp_pd_mask((__m512d)x[0], (__m512d)bound, _CMP_LE_OQ);
    for (int j = 1; j < kVectors; ++j)
      below = _mm512_mask_cmp_pd_mask(below, (__m512d)x[j], (__m512d)bound, _CMP_LE_OQ);
    return !_kortestc_mask8_u8(below, below);
  }
#elif defined(__AVX2__)
  V above[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (kSingle)
      above[j] = (V)_mm256_cmp_ps((__m256)x[j], (__m256)bound, _CMP_NLE_UQ);
    else
      above[j] = (V)_mm256_cmp_pd((__m256d)x[j], (__m256d)bound, _CMP_NLE_UQ);
  }
  if constexpr (kSingle)
    return _mm256_movemask_ps(_mm256_or_ps((__m256)above[0], _mm256_or_ps((__m256)above[1], (__m256)above[2]))) != 0;
  else
    return _mm256_movemask_pd(_mm256_or_pd((__m256d)above[0], _mm256_or_pd((__m256d)above[1], (__m256d)above[2]))) != 0;
#elif defined(__aarch64__)
  return vminvq_u32((uint32x4_t)((x[0] <= bound) & (x[1] <= bound) & (x[2] <= bound))) == 0;
#else
  const auto fine = (x[0] <= bound) & (x[1] <= bound) & (x[2] <= bound);
  bool all = true;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(x[0][0])); ++i) all &= fine[i] != 0;
  return !all;
#endif
}

#if defined(FC_BF16_DOTS)
// c plus the dot product of each pair of bfloat16 numbers at b with the pair a.
static inline Vec<float> add_bf16_dots(Vec<float> c, uint32_t a, const uint32_t* b) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                      (__m512bh)_mm512_loadu_si512(b));
#else
  return (Vec<float>)vbfdotq_f32((float32x4_t)c, vreinterpretq_bf16_u32(vdupq_n_u32(a)),
                                 vreinterpretq_bf16_u32(vld1q_u32(b)));
#endif
}
#endif

}  // namespace fc::cpu::FC_TIER
