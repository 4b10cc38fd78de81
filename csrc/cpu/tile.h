// The tile core: a low-rank product consumed by an epilogue before it is stored.
//
// A packed block holds kRows rows of the left factor, [k][kRows]; a packed panel holds kColumns columns of the right
// factor, [k][kColumns]. multiply() runs one block against one panel in registers and leaves the [kRows][kColumns] tile
// in a buffer that stays in the L1 cache; the op's epilogue reads it there. A Scheme is a precision: the element types
// of both factors and how one step multiplies.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "simd.h"

namespace fc::cpu::FC_TIER {

// Scratch of one task, aligned for vectors.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count)
      : count(count), data(static_cast<T*>(std::aligned_alloc(64, (bytes() + 127) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t bytes() const { return static_cast<size_t>(count) * sizeof(T); }

  int64_t count;
  T* data;
};

struct BFloat16 {
  uint16_t bits;
};

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

static inline uint16_t round_bf16(float x) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// One multiply-add a step in the accumulator's own type.
template <class T>
struct Ieee {
  using Accumulator = T;
  using Left = T;
  using Right = T;
  static constexpr int64_t kDepth = 1;  // inner indices a step
  template <class Source>
  static Left left(const Source* a, int64_t stride, int64_t) {
    (void)stride;
    return widen(*a);
  }
  template <class Source>
  static Right right(const Source* b, int64_t stride, int64_t) {
    (void)stride;
    return widen(*b);
  }
  static Vec<T> step(Vec<T> c, Left a, const Right* b) { return c + broadcast<T>(a) * load(b); }
};

#if defined(__AVX512BF16__)
// Two multiply-adds a step: both factors rounded to bfloat16, products and sums in fp32.
struct Bf16Dot {
  using Accumulator = float;
  using Left = uint32_t;
  using Right = uint32_t;
  static constexpr int64_t kDepth = 2;
  template <class Source>
  static uint32_t pair(const Source* x, int64_t stride, int64_t remaining) {
    const uint32_t low = round_bf16(widen(*x));
    return remaining < 2 ? low : low | static_cast<uint32_t>(round_bf16(widen(x[stride]))) << 16;
  }
  template <class Source>
  static Left left(const Source* a, int64_t stride, int64_t remaining) {
    return pair(a, stride, remaining);
  }
  template <class Source>
  static Right right(const Source* b, int64_t stride, int64_t remaining) {
    return pair(b, stride, remaining);
  }
  static Vec<float> step(Vec<float> c, Left a, const Right* b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                        (__m512bh)_mm512_loadu_si512(b));
  }
};
#endif

template <class Scheme>
inline constexpr int kWidth = kColumns<typename Scheme::Accumulator>;

template <class Scheme>
static int64_t steps(int64_t depth) {
  return (depth + Scheme::kDepth - 1) / Scheme::kDepth;
}

// Fetches a part of a matrix that is needed next into the L2 cache a few lines at a time, while another is worked on:
// hardware follows no rows that lie pages apart, and starts anew after each pause.
struct Ahead {
  const char* row;
  int64_t stride, width, rows;  // bytes, bytes, count
  int64_t times;                // it is fetched in
  int64_t done = 0;
  int64_t each = (rows * ((width + 63) / 64) + times - 1) / times;

  void fetch() {
    for (int64_t lines = each; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + done, 0, 2);
      done += 64;
      if (done < width) continue;
      done = 0, row += stride, --rows;
    }
  }
};

// Packs one row of the left factor (elements `stride` apart) as row `lane` of a block.
template <class Scheme, class Source>
static void pack_left(typename Scheme::Left* block, int lane, const Source* row, int64_t depth, int64_t stride) {
  for (int64_t k = 0; k < depth; k += Scheme::kDepth, block += kRows)
    block[lane] = Scheme::left(row + k * stride, stride, depth - k);
}

// Calls f with the stride as a compile-time 1 where it is 1: such loops become vector loads.
template <class F>
static inline void with_stride(int64_t stride, F f) {
  struct One {
    constexpr operator int64_t() const { return 1; }
  };
  if (stride == 1)
    f(One{});
  else
    f(stride);
}

// out[k][j] = columns[j][k] for a square of a vector's lanes; out's rows lie `width` apart, columns `stride`.
template <class T, class Source>
static void transpose_square(T* out, int64_t width, const Source* columns, int64_t stride) {
  Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<T>; ++j) {
    alignas(64) T column[kLanes<T>];
    for (int k = 0; k < kLanes<T>; ++k) column[k] = widen(columns[j * stride + k]);
    square[j] = load(column);
  }
  transpose<T>(square);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<T>; ++k) store(out + k * width, square[k]);
}

// Packs `columns` columns of the right factor, whose rows lie `row_stride` apart and columns `column_stride`, as
// consecutive panels; the columns past the last are zero.
template <class Scheme, class Source>
static void pack_right(typename Scheme::Right* panels, const Source* b, int64_t depth, int64_t columns,
                       int64_t row_stride, int64_t column_stride) {
  constexpr int64_t width = kWidth<Scheme>;
  const int64_t panel_size = steps<Scheme>(depth) * width;
  if constexpr (Scheme::kDepth == 1) {
    using T = typename Scheme::Right;
    constexpr int64_t square = kLanes<T>;
    if (row_stride == 1 && column_stride != 1 && columns % square == 0 && depth % square == 0) {
      for (int64_t first = 0; first < columns; first += square)
        for (int64_t k = 0; k < depth; k += square)
          transpose_square(panels + first / width * panel_size + k * width + first % width, width,
                           b + first * column_stride + k, column_stride);
      if (columns % width == 0) return;
      for (T* row = panels + columns / width * panel_size; row < panels + (columns / width + 1) * panel_size;
           row += width)
        for (int64_t j = columns % width; j < width; ++j) row[j] = 0;
      return;
    }
  }
  with_stride(column_stride, [&](auto stride) {
    for (int64_t k = 0, s = 0; k < depth; k += Scheme::kDepth, ++s) {
      const Source* row = b + k * row_stride;
      for (int64_t first = 0; first < columns; first += width, row += width * stride) {
        typename Scheme::Right* __restrict out = panels + first / width * panel_size + s * width;
        const int64_t here = columns - first < width ? columns - first : width;
        if (here == width) {
          for (int64_t j = 0; j < width; ++j) out[j] = Scheme::right(row + j * stride, row_stride, depth - k);
          continue;
        }
        for (int64_t j = 0; j < here; ++j) out[j] = Scheme::right(row + j * stride, row_stride, depth - k);
        for (int64_t j = here; j < width; ++j) out[j] = 0;
      }
    }
  });
}

struct FromZero {
  constexpr std::nullptr_t operator()(int) const { return nullptr; }
};
struct Nothing {
  void operator()(int) const {}
};

// tile = start + block times panel, [kRows][kColumns].
// start(i) points at kColumns values for row i, or is null for zeros. Sums of many products start from zero or from
// such sums: every multiply-add rounds at the size of the whole. meanwhile(i) is called for i in 0..kRows-1, spread
// over the multiply-adds: an epilogue that consumes row i of the tile before this one runs in the shadow of this one's.
// kStride: between the block's steps, where the block is a part of something wider. kAcross: vectors of a panel's row,
// where tile and panel begin within wider ones.
template <class Scheme, int kStride = kRows, int kAcross = kVectors, class Start = FromZero, class Meanwhile = Nothing>
static inline void multiply(typename Scheme::Accumulator* tile, const typename Scheme::Left* block,
                            const typename Scheme::Right* panel, int64_t count, Start start = {},
                            Meanwhile meanwhile = {}) {
  using T = typename Scheme::Accumulator;
  constexpr int lanes = kLanes<T>;
  Vec<T> c[kRows][kAcross];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const T* from = start(i);
#pragma GCC unroll 3
    for (int j = 0; j < kAcross; ++j) c[i][j] = from == nullptr ? Vec<T>{} : load(from + j * lanes);
  }
  int64_t k = 0;
  constexpr int pauses = std::is_same_v<Meanwhile, Nothing> ? 1 : kRows;
  for (int row = 0; row < pauses; ++row) {
    for (const int64_t end = count * (row + 1) / pauses; k < end; ++k, block += kStride, panel += kWidth<Scheme>) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < kAcross; ++j) c[i][j] = Scheme::step(c[i][j], block[i], panel + j * lanes);
    }
    meanwhile(row);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kAcross; ++j) store(tile + i * kWidth<Scheme> + j * lanes, c[i][j]);
}

// f(the number of vectors across, as a constant).
template <class F>
static inline void with_across(int64_t across, F f) {
  static_assert(kVectors == 3);
  if (across == 1)
    f(std::integral_constant<int, 1>{});
  else if (across == 2)
    f(std::integral_constant<int, 2>{});
  else
    f(std::integral_constant<int, 3>{});
}

}  // namespace fc::cpu::FC_TIER
