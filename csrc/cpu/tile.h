// The tile core: computes a low-rank product a tile at a time, so that an op can consume it before it is stored.
//
// The left factor is packed into blocks of kRows rows, [k][kRows], and the right one into panels of kColumns columns,
// [k][kColumns]. multiply() multiplies one block by one panel in registers and leaves the [kRows][kColumns] tile in a
// buffer that stays in the L1 cache, where the op's epilogue reads it. A Scheme is a precision: the element types of
// both factors, and how one step multiplies and adds.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>

#include "blocks.h"
#include "simd.h"

namespace fc::cpu::FC_TIER {

// Scratch of one task, aligned for vectors.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : count(count), data(static_cast<T*>(take_block(bytes()))) {}
  ~Buffer() { give_block(data, bytes()); }
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
  static double part(T x, int64_t) { return x; }  // the inner indices of a packed element, one by one
  static Vec<T> squares(const Right* b) { return load(b) * load(b); }
};

#if defined(FC_BF16_DOTS)
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
  static Vec<float> step(Vec<float> c, Left a, const Right* b) { return add_bf16_dots(c, a, b); }
  static double part(uint32_t x, int64_t k) { return widen(BFloat16{static_cast<uint16_t>(x >> 16 * k)}); }
  static Vec<float> squares(const Right* b) {
    using I = Simd<float>::I;
    const auto pairs = (I)load(reinterpret_cast<const float*>(b));
    const auto low = (Vec<float>)(pairs << 16), high = (Vec<float>)(pairs >> 16 << 16);
    return low * low + high * high;
  }
};
#endif

template <class Scheme>
inline constexpr int kWidth = kColumns<typename Scheme::Accumulator>;

inline constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// How many steps an inner dimension takes, blocks some rows, panels some columns.
template <class Scheme>
static int64_t steps(int64_t depth) {
  return (depth + Scheme::kDepth - 1) / Scheme::kDepth;
}
static inline int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }
template <class Scheme>
static int64_t panels_of(int64_t columns) {
  return (columns + kWidth<Scheme> - 1) / kWidth<Scheme>;
}

// Fetches the part of a matrix that is needed next into the L2 cache, a few lines at a time, while another part is
// worked on: hardware prefetchers follow no rows that lie pages apart, and start anew after each pause.
struct Prefetch {
  const char* row = nullptr;
  int64_t stride = 0, width = 0, rows = 0;  // of the part: bytes, bytes, count
  int64_t calls = 1;                        // of fetch() that bring all of it
  int64_t done = 0;                         // bytes of the row
  int64_t lines_a_call = (rows * ((width + 63) / 64) + calls - 1) / calls;

  void fetch() {
    for (int64_t lines = lines_a_call; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + done, 0, 2);
      done += 64;
      if (done < width) continue;
      done = 0, row += stride, --rows;
    }
  }
};

// Packs one row of the left factor, whose elements lie `stride` apart, as row i of consecutive blocks.
template <class Scheme, class Source>
static void pack_left(typename Scheme::Left* blocks, int64_t i, const Source* row, int64_t depth, int64_t stride) {
  typename Scheme::Left* out = blocks + i / kRows * kRows * steps<Scheme>(depth) + i % kRows;
  for (int64_t k = 0; k < depth; k += Scheme::kDepth, out += kRows)
    *out = Scheme::left(row + k * stride, stride, depth - k);
}

// Packs all rows of the left factor; the rows that fill the last block are zero.
template <class Scheme, class Source>
static void pack_rows(typename Scheme::Left* blocks, const Source* a, int64_t rows, int64_t depth, int64_t row_stride,
                      int64_t stride) {
  const int64_t size = blocks_of(rows) * kRows * steps<Scheme>(depth);
  std::memset(static_cast<void*>(blocks), 0, static_cast<size_t>(size) * sizeof *blocks);
  for (int64_t i = 0; i < rows; ++i) pack_left<Scheme>(blocks, i, a + i * row_stride, depth, stride);
}

// Calls f with the stride, as a compile-time 1 where it is 1: the compiler turns such loops into vector loads.
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

// Transposes a square of as many columns as a vector has lanes: out[k][j] = columns[j][k]. The rows of `out` lie
// `width` apart, the columns `stride`.
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
// start(i) points at the kColumns values that row i starts from, or is null for zeros. A sum of many products starts
// from zeros or from a part of that sum, since every multiply-add rounds at the size of what it adds to.
// meanwhile(i) is called for i in 0..kRows-1, spread over the multiply-adds, to fetch what comes next. kStride is the
// distance between the block's steps, for a block that is a part of something wider; kAcross is how many vectors of a
// panel's row are multiplied, for a tile and a panel that begin within wider ones.
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
  const auto step = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      read_again(panel);
#pragma GCC unroll 3
      for (int j = 0; j < kAcross; ++j) c[i][j] = Scheme::step(c[i][j], block[i], panel + j * lanes);
    }
    block += kStride, panel += kWidth<Scheme>;
  };
  int64_t k = 0;
  constexpr int pauses = std::is_same_v<Meanwhile, Nothing> ? 1 : kRows;
  for (int row = 0; row < pauses; ++row) {
    const int64_t end = count * (row + 1) / pauses;
    for (; pauses == 1 && k + 4 <= end; k += 4) {  // a loop of few turns, whose end processors foresee
      step(), step();
      step(), step();
    }
    for (; k < end; ++k) step();
    meanwhile(row);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kAcross; ++j) store(tile + i * kWidth<Scheme> + j * lanes, c[i][j]);
}

// Products in fp64 of the rows of a block with one column of a panel, at which `column` points.
template <class Scheme>
static void multiply_column(double (&out)[kRows], const typename Scheme::Left* block,
                            const typename Scheme::Right* column, int64_t count) {
  for (double& x : out) x = 0;
  for (int64_t k = 0; k < count; ++k, block += kRows, column += kWidth<Scheme>)
    for (int64_t part = 0; part < Scheme::kDepth; ++part) {
      const double factor = Scheme::part(*column, part);
      for (int i = 0; i < kRows; ++i) out[i] += Scheme::part(block[i], part) * factor;
    }
}

// Products in fp64 of one row of a block, at which `row` points, with all columns of a panel.
template <class Scheme>
static void multiply_row(double (&out)[kWidth<Scheme>], const typename Scheme::Left* row,
                         const typename Scheme::Right* panel, int64_t count) {
  for (double& x : out) x = 0;
  for (int64_t k = 0; k < count; ++k, row += kRows, panel += kWidth<Scheme>)
    for (int64_t part = 0; part < Scheme::kDepth; ++part) {
      const double factor = Scheme::part(*row, part);
      for (int j = 0; j < kWidth<Scheme>; ++j) out[j] += factor * Scheme::part(panel[j], part);
    }
}

// At least the norm of the longest column of a panel, so far as norms above 1e-17 are told apart.
template <class Scheme>
static typename Scheme::Accumulator longest_column(const typename Scheme::Right* panel, int64_t count) {
  using T = typename Scheme::Accumulator;
  Vec<T> squares[kVectors];
  for (Vec<T>& x : squares) x = broadcast<T>(T(1e-34));
  for (int64_t k = 0; k < count; ++k, panel += kWidth<Scheme>)
    for (int j = 0; j < kVectors; ++j) squares[j] += Scheme::squares(panel + j * kLanes<T>);
  T most = 0;
  for (const Vec<T>& x : squares)
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(x[i] <= most)) most = x[i] == x[i] ? x[i] : std::numeric_limits<T>::infinity();
  return std::sqrt(most) * T(1.00001);
}

// Calls f with the number of vectors across, as a compile-time constant.
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
