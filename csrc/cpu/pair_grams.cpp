// pair_grams on the CPU: ||X_i Y_j||^2 as the inner product of the Gram matrices X_i^T X_i and Y_j Y_j^T. Both are
// symmetric [d,d], so for d < r s it is less work than the product; their tiles are made and consumed where they are
// needed, never stored whole. Of the squares they are cut into, those on and below the diagonal are made.
// Sums run in an order that depends on the shapes alone: results do not depend on threads.
//
// There is a second micro-kernel, add_dots(), because tiles come out of multiply() with the entries of one factor side
// by side: feeding them to multiply() again would take a transposition that costs as much as it saves.
#include "dispatch.h"
#include "interrupts.h"

namespace fc::cpu {

// Factors F_i: `inner` rows of `depth` entries, any strides; X_i = outer_i F_{i / shared} has `rank` rows.
struct GramFactors {
  Strided<3> factors, outer;  // by factor, row and entry; outer: [rank, inner] each, or null for the identity
  int64_t count, shared, inner;
};

// One side of all pairs: the X_i of several tensors, one after the other.
struct GramSide {
  const GramFactors* parts;
  int64_t count, rank, depth;
};

struct GramArguments {
  GramSide left, right;
  const bool* wanted;  // [N,M]: the pairs to compute
  int64_t l2_bytes;    // of the cache
};

// Gram matrices are cut into square units, a panel of rows against a panel of columns: units first..end of them.
struct GramUnits {
  int64_t first, end;
};

// What a group of units adds, in fp64: inner products [N,M] of the wanted pairs, and squared norms of the Gram matrices
// of both sides, [N+M].
struct GramSums {
  double *inner, *squares;
};

struct GramKernels {
  int64_t (*packed_bytes)(const GramSide&);
  double (*pack)(const GramSide&, void* packed, int64_t factor);  // returns ||X||^2
  int64_t (*units)(const GramArguments&);
  int64_t (*scratch_bytes)(const GramArguments&);
  void (*grams)(const GramArguments&, const void* left, const void* right, const GramUnits&, const GramSums&,
                void* scratch);
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include <bit>

namespace fc::cpu::FC_TIER {

template <class Scheme, class Source>
struct Grams {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int64_t kTile = kRows * kW;
  static_assert(kW % kRows == 0, "a block of rows lies within one panel");
  static constexpr int64_t kBlocks = kW / kRows;  // of a unit
  static constexpr int64_t kEntries = kBlocks * kTile;

  // Tiles whose entries add_dots() takes at a time: fp32 or fp64 sums run over a chunk, sums of chunks in fp64. The
  // chunks of kRows left and kVectors right factors stay in the L1 cache on every tier but the widest, where they are
  // 33 KiB.
  static constexpr int64_t kBlocksAChunk = 2;
  static constexpr int64_t kChunkBytes = kBlocksAChunk * kTile * static_cast<int64_t>(sizeof(T));
  static_assert((kRows + kVectors) * kChunkBytes <= (kVectorBytes == 64 ? 48 << 10 : kSmallestL1));

  // Right factors whose tiles are made together: a chunk of each stays in two fifths of the L2 cache.
  static int64_t rights_a_group(const GramArguments& g) {
    return larger(1, g.l2_bytes * 2 / 5 / kChunkBytes / kVectors) * kVectors;
  }

  static int64_t panels(const GramSide& s) { return panels_of<Scheme>(s.depth); }
  static int64_t panel_size(const GramSide& s) { return blocks_of(s.rank) * kRows * kW; }
  static int64_t packed_bytes(const GramSide& s) {
    return s.count * panels(s) * panel_size(s) * static_cast<int64_t>(sizeof(T));
  }

  // Whether every block of rows begins with zeros up to its first row, so that their products can be left out. The
  // diagonal must have no zeros: an infinity that the zeros would have met, and turned into NaN, then shows anyway.
  static bool is_triangle(const Source* outer, int64_t rows, int64_t columns, int64_t row_stride, int64_t stride) {
    bool triangle = rows <= columns;
    for (int64_t row = 0; row < rows && triangle; ++row) {
      triangle = widen(outer[row * (row_stride + stride)]) != 0;
      for (int64_t k = 0; k < row / kRows * kRows; ++k) triangle &= widen(outer[row * row_stride + k * stride]) == 0;
    }
    return triangle;
  }

  // Packs X_i as panels [panel][factor][row][kW], since the same panel of all factors is read in turn, and returns
  // ||X_i||^2. Rows past the last and entries past the depth are zero.
  static double pack(const GramSide& s, void* packed, int64_t i) {
    T* out = static_cast<T*>(packed) + i * panel_size(s);
    const GramFactors* f = s.parts;
    for (; i >= f->count; ++f) i -= f->count;
    const Source* factor = f->factors.at<Source>(i / f->shared);
    const int64_t rows = blocks_of(s.rank) * kRows;
    Buffer<T> panel{f->outer.data == nullptr ? 0 : f->inner * kW};
    Buffer<T> blocks{f->outer.data == nullptr ? 0 : rows * f->inner};
    bool triangle = false;
    double total = 0;
    if (f->outer.data != nullptr) {
      const Source* outer = f->outer.at<Source>(i);
      triangle = is_triangle(outer, s.rank, f->inner, f->outer.stride[1], f->outer.stride[2]);
      pack_rows<Scheme>(blocks.data, outer, s.rank, f->inner, f->outer.stride[1], f->outer.stride[2]);
    }
    for (int64_t first = 0; first < s.depth; first += kW, out += s.count * panel_size(s)) {
      T* given = f->outer.data == nullptr ? out : panel.data;
      pack_right<Scheme>(given, factor + first * f->factors.stride[2], f->inner, smaller(kW, s.depth - first),
                         f->factors.stride[1], f->factors.stride[2]);
      Vec<T> square{};
      if (f->outer.data == nullptr) {
        for (int64_t e = s.rank * kW; e < rows * kW; ++e) out[e] = 0;
        for (int64_t row = 0; row < rows; row += kRows) square += squares(out + row * kW);
      } else {
        for (int64_t row = 0; row < rows; row += kRows) {
          const int64_t zeros = triangle ? row : 0;
          alignas(kVectorBytes) T tile[kTile];
          multiply<Scheme>(tile, blocks.data + row * f->inner + zeros * kRows, panel.data + zeros * kW,
                           f->inner - zeros);
          square += squares(tile);
          for (int64_t e = 0; e < kTile; e += kLanes<T>) stream(out + row * kW + e, load(tile + e));
        }
      }
      total += static_cast<double>(sum<T>(square));
    }
    drain();
    return total;
  }

  static int64_t units(const GramArguments& g) { return panels(g.left) * (panels(g.left) + 1) / 2; }

  // Makes the unit of panels `down` and `across` for factors first..end, [factor][entry], and adds its part of their
  // squared norms.
  static void tiles(const GramSide& s, const void* packed, int64_t down, int64_t across, int64_t first, int64_t end,
                    T* out, double* squares_of) {
    const int64_t size = panel_size(s), some = size / kW;  // entries fetched at each of a unit's kW steps
    const T* x = static_cast<const T*>(packed) + first * size;
    const T *rows = x + down * s.count * size, *columns = x + across * s.count * size;
    for (int64_t i = first; i < end; ++i, rows += size, columns += size) {
      Vec<T> square{};
      for (int64_t b = 0; b < kBlocks; ++b, out += kTile) {
        // Prefetches the next factor's panels and the next tile. Always inlined: as a function, GCC finds it pure and
        // drops its calls.
        const auto fetch = [&](int step) __attribute__((always_inline)) {
          for (int64_t e = size + (b * kRows + step) * some, last = e + some; e < last; e += 64 / sizeof(T)) {
            __builtin_prefetch(rows + e, 0, 2);
            __builtin_prefetch(columns + e, 0, 2);
          }
          for (int j = 0; j < kVectors; ++j) __builtin_prefetch(out + kTile + step * kW + j * kLanes<T>, 1, 3);
        };
        multiply<Scheme, static_cast<int>(kW)>(out, rows + b * kRows, columns, s.rank, FromZero{}, fetch);
        square += squares(out);
      }
      squares_of[i] += (down == across ? 1 : 2) * static_cast<double>(sum<T>(square));
    }
  }

  static Vec<T> squares(const T* tile) {
    Vec<T> total[kVectors] = {};
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) {
        const Vec<T> x = load(tile + i * kW + j * kLanes<T>);
        total[j] += x * x;
      }
    for (int j = 1; j < kVectors; ++j) total[0] += total[j];
    return total[0];
  }

  // sums[i][j] += weight * (left row i . right row j) for kRows left and kVectors right rows, which lie kEntries apart.
  [[gnu::noinline]] static void add_dots(const T* left, const T* right, int64_t count, double weight, double* sums) {
    Vec<T> c[kRows][kVectors] = {};
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      Vec<T> b[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) b[j] = load(right + j * kEntries + k);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        Vec<T> a = load(left + i * kEntries + k);
        in_register(a);
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) c[i][j] += a * b[j];
      }
    }
    add_sums<0>(&c[0][0], weight, sums);
  }

  // sums[n] += weight * (the sum of the lanes of c[n]), for n from kFirst on.
  template <int kFirst>
  static inline void add_sums(const Vec<T>* c, double weight, double* sums) {
    constexpr int lanes = kLanes<T>, left = kRows * kVectors - kFirst;
    if constexpr (left > 0) {
      constexpr int some = left < lanes ? static_cast<int>(std::bit_floor(unsigned{left})) : lanes;
      alignas(64) T total[lanes];
      store(total, fc::cpu::FC_TIER::sums<T, some>(c + kFirst));
#pragma GCC unroll 16
      for (int n = 0; n < some; ++n) sums[kFirst + n] += weight * static_cast<double>(total[n]);
      add_sums<kFirst + some>(c, weight, sums);
    }
  }

  static bool any_wanted(const GramArguments& g, int64_t i, int64_t j) {
    for (int64_t row = i; row < smaller(i + kRows, g.left.count); ++row)
      for (int64_t c = j; c < smaller(j + kVectors, g.right.count); ++c)
        if (g.wanted[row * g.right.count + c]) return true;
    return false;
  }

  static int64_t blocks_across(int64_t count) { return (count + kVectors - 1) / kVectors; }
  static int64_t scratch_bytes(const GramArguments& g) {  // for the tiles of a unit
    return (blocks_of(g.left.count) * kRows + rights_a_group(g)) * kEntries * static_cast<int64_t>(sizeof(T));
  }

  static void grams(const GramArguments& g, const void* left, const void* right, const GramUnits& units,
                    const GramSums& out, void* scratch) {
    const int64_t N = g.left.count, M = g.right.count, down = blocks_of(N), across = blocks_across(M);
    const int64_t rights = rights_a_group(g);
    T* left_tiles = static_cast<T*>(scratch);
    T* right_tiles = left_tiles + down * kRows * kEntries;
    const auto clear = [](T* tiles, int64_t first, int64_t end) {  // in the place of factors past the last
      std::memset(static_cast<void*>(tiles + first * kEntries), 0,
                  static_cast<size_t>((end - first) * kEntries) * sizeof(T));
    };
    clear(left_tiles, N, down * kRows);
    clear(right_tiles, M % rights, blocks_across(M % rights) * kVectors);
    Buffer<bool> wanted{down * across};
    Buffer<double> sums{down * across * kRows * kVectors};
    std::memset(static_cast<void*>(sums.data), 0, sums.bytes());
    for (int64_t n = 0; n < down * across; ++n)
      wanted.data[n] = any_wanted(g, n / across * kRows, n % across * kVectors);

    int64_t unit = 0;
    for (int64_t panel = 0; panel < panels(g.left); ++panel)
      for (int64_t rows = panel; rows < panels(g.left); ++rows, ++unit) {
        if (unit < units.first || unit >= units.end) continue;
        look_for_interrupt();
        tiles(g.left, left, rows, panel, 0, N, left_tiles, out.squares);
        for (int64_t group = 0; group < M; group += rights) {
          const int64_t end = smaller(group + rights, M);
          tiles(g.right, right, rows, panel, group, end, right_tiles, out.squares + N);
          for (int64_t chunk = 0; chunk < kBlocks; chunk += kBlocksAChunk)
            for (int64_t i = 0; i < down; ++i)
              for (int64_t j = group / kVectors; j < blocks_across(end); ++j)
                if (wanted.data[i * across + j])
                  add_dots(left_tiles + i * kRows * kEntries + chunk * kTile,
                           right_tiles + (j * kVectors - group) * kEntries + chunk * kTile,
                           smaller(kBlocksAChunk, kBlocks - chunk) * kTile, rows == panel ? 1 : 2,
                           sums.data + (i * across + j) * kRows * kVectors);
        }
      }
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < M; ++j) {
        if (!g.wanted[i * M + j]) continue;
        const int64_t block = i / kRows * across + j / kVectors;
        out.inner[i * M + j] = sums.data[block * kRows * kVectors + i % kRows * kVectors + j % kVectors];
      }
  }

  static const GramKernels* kernels() {
    static constexpr GramKernels table{packed_bytes, pack, units, scratch_bytes, grams};
    return &table;
  }
};

const GramKernels* gram_kernels(Arithmetic arithmetic) { return select<Grams, Dots::none>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <memory>

namespace fc::cpu {

FC_TIERS(const GramKernels*, gram_kernels, Arithmetic)

namespace {

// Gram matrices are summed in groups of units, each with partial sums of its own that are added in order: the number of
// groups decides the order of the sums, so it depends on the shapes alone. At most kMostGroups, whose partial sums take
// no more than kPartialSums numbers (64 MiB).
constexpr int64_t kMostGroups = 32, kPartialSums = 8 << 20;

// row, entry: which of the factors' dimensions are the rows and the entries of X.
GramFactors factors_of(Sizes& sizes, const std::string& name, const std::string& place, const Tensor& factors,
                       const Tensor* outer, int row, int entry) {
  const auto ordered = [&](const Tensor& x) {
    return Strided<3>{x.data_ptr(), {x.stride(0), x.stride(row), x.stride(entry)}};
  };
  GramFactors f{ordered(factors), {}, factors.size(0), 1, factors.size(row)};
  if (outer == nullptr) return f;
  FC_CHECK(outer->dim() == 3 && outer->size(entry) == f.inner && outer->size(0) % std::max<int64_t>(f.count, 1) == 0 &&
               (f.count > 0 || outer->size(0) == 0),
           name, "_outer", place, " has shape ", shape_of(*outer), ", which does not fit ", name, place, " ",
           shape_of(factors));
  sizes.check_elements(name + "_outer" + place, *outer);
  f.outer = ordered(*outer);
  f.shared = outer->size(0) / std::max<int64_t>(f.count, 1);
  f.count = outer->size(0);
  return f;
}

// One side, and the parts it points at.
struct Side : GramSide {
  Side(Sizes& sizes, const std::string& name, const std::vector<Tensor>& factors, const std::vector<Tensor>& outers,
       int row, int entry)
      : GramSide{} {
    FC_CHECK(outers.empty() || outers.size() == factors.size(), name, "_outer has ", outers.size(), " tensors, but ",
             name, " has ", factors.size());
    for (size_t i = 0; i < factors.size(); ++i) {
      const Tensor& f = factors[i];
      const Tensor* outer = outers.empty() ? nullptr : &outers[i];
      std::string place;
      if (factors.size() > 1) place.append("[").append(std::to_string(i)).append("]");
      FC_CHECK(f.dim() == 3, name, place, " has shape ", shape_of(f), ", expected three dimensions");
      sizes.check_elements(name + place, f);
      held.push_back(factors_of(sizes, name, place, f, outer, row, entry));
      const int64_t rank_here = (outer == nullptr ? f : *outer).size(row), depth_here = f.size(entry);
      if (i == 0) rank = rank_here, depth = depth_here;
      FC_CHECK(depth_here == depth, name, place, " has shape ", shape_of(f), ", but ", name, "[0] has ",
               shape_of(factors[0]), ": their d differ");
      FC_CHECK(rank_here == rank, name, place, " makes factors of ", rank_here, " rows or columns, but ", name,
               "[0] of ", rank);
      count += held.back().count;
    }
    parts = held.data();
  }

 private:
  std::vector<GramFactors> held;
};

std::tuple<Tensor, Tensor, Tensor> pair_grams(const Tensor& left, const std::vector<Tensor>& right,
                                              const std::optional<Tensor>& left_outer,
                                              const std::vector<Tensor>& right_outer,
                                              const std::optional<Tensor>& before) {
  FC_CHECK(!right.empty(), "right is empty, expected at least one tensor");
  const std::vector<Tensor> left_outers =
      left_outer.has_value() ? std::vector<Tensor>{*left_outer} : std::vector<Tensor>{};
  Sizes sizes;
  const Side lefts(sizes, "left", {left}, left_outers, 1, 2), rights(sizes, "right", right, right_outer, 2, 1);
  FC_CHECK(lefts.depth == rights.depth, "left has shape ", shape_of(left), " and right ", shape_of(right[0]),
           ": their d differ");
  const int64_t N = lefts.count, M = rights.count;
  sizes("before", before, std::to_string(M), Kind::index);
  const GramKernels& kernels = *pick_gram_kernels(arithmetic_of("left", left));

  const std::optional<Tensor> before_c = contiguous_as(before, ScalarType::Long);
  const std::unique_ptr<bool[]> wanted(new bool[static_cast<size_t>(N * M)]);
  const auto* bound = data_of<const int64_t>(before_c);
  for (int64_t n = 0; n < N * M; ++n) wanted[n] = bound == nullptr || n / M < bound[n % M];
  const GramArguments g{lefts, rights, wanted.get(), caches().l2};

  const auto fp64 = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_zeros(left, size, ScalarType::Double);
  };
  Tensor inner = fp64({N, M}), left_moments = fp64({N, 2}), right_moments = fp64({M, 2});
  if (N * M * lefts.rank * rights.rank * lefts.depth > 0) {
    const auto moments = [&](int64_t i) {
      return data_of<double>(i < N ? left_moments : right_moments) + 2 * (i < N ? i : i - N);
    };
    const HugeScratch packed_left(kernels.packed_bytes(g.left)), packed_right(kernels.packed_bytes(g.right));
    run_tasks(N + M, [&](int64_t i) {
      moments(i)[0] =
          i < N ? kernels.pack(g.left, packed_left.data(), i) : kernels.pack(g.right, packed_right.data(), i - N);
    });
    // The first groups are the largest, so that threads finish together.
    const int64_t units = kernels.units(g), size = N * M + N + M;
    const int64_t groups = std::clamp<int64_t>(kPartialSums / size, 1, std::min(kMostGroups, units));
    const auto first_unit = [&](int64_t i) { return units * i * (2 * groups - i) / (groups * groups); };
    const HugeScratch partials(groups * size * static_cast<int64_t>(sizeof(double)));
    auto* const partial = static_cast<double*>(partials.data());
    run_tasks(groups, kernels.scratch_bytes(g), [&](int64_t i, void* scratch) {
      double* sums = partial + i * size;
      std::fill(sums, sums + size, 0.0);
      kernels.grams(g, packed_left.data(), packed_right.data(), {first_unit(i), first_unit(i + 1)},
                    {sums, sums + N * M}, scratch);
    });
    auto* const to = data_of<double>(inner);
    constexpr int64_t some = 4096;
    run_tasks(ceil_div(N * M, some), [&](int64_t task) {
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t n = task * some; n < std::min(N * M, (task + 1) * some); ++n) to[n] += partial[group * size + n];
    });
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < N + M; ++i) moments(i)[1] += partial[group * size + N * M + i];
  }
  return {inner, left_moments, right_moments};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("pair_grams", TORCH_BOX(&fc::cpu::pair_grams)); }

#endif
