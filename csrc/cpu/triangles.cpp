// triangles on the CPU: the Cholesky factors of many Gram matrices W^T W, made in fp64. LAPACK's QR of a tall factor
// takes longer than all that is done with the result; rounding in fp64 leaves Cholesky's squared condition number
// harmless to fp32 factors.
#include <cstdint>

#include "dispatch.h"

namespace fc::cpu {

struct TriangleArguments {
  const void* factors;  // [N,d,r], any strides
  int64_t stride[3];
  int64_t count, depth, rank;
  void* triangles;  // [N,r,r], upper; fp64 for fp64 factors, else fp32
  bool* regular;    // [N]
};

using TriangleTask = void (*)(const TriangleArguments&, int64_t factor);

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cmath>

#include "tile.h"

namespace fc::cpu::FC_TIER {
namespace {

constexpr int64_t kStepsAChunk = 64;  // of the depth: all columns of a chunk stay in the L1 cache

// R in the place of A (its upper half): R^T R = A. False where A is not positive definite. Rows are worked on from the
// vector that holds their first entry; what lies left of that entry is cleared when its row's turn comes.
bool cholesky(double* a, int64_t n) {
  const auto from = [](int64_t k) { return k / kLanes<double> * kLanes<double>; };
  for (int64_t j = 0; j < n; ++j) {
    double* row = a + j * n;
    for (int64_t k = 0; k < j; ++k) row[k] = 0;
    if (!(row[j] > 0)) return false;
    const double scale = 1 / std::sqrt(row[j]);
    for (int64_t k = from(j); k < n; ++k) row[k] *= scale;
    for (int64_t i = j + 1; i < n; ++i) {
      double* __restrict below = a + i * n;
      const double factor = row[i];
      for (int64_t k = from(i); k < n; ++k) below[k] -= factor * row[k];
    }
  }
  return true;
}

template <class Source, class Out>
void run(const TriangleArguments& s, int64_t factor) {
  using Scheme = Ieee<double>;
  constexpr int width = kWidth<Scheme>, lanes = kLanes<double>;
  const int64_t r = s.rank, panels = (r + width - 1) / width;
  const auto* w = static_cast<const Source*>(s.factors) + factor * s.stride[0];
  static_assert(width % kRows == 0, "a block of rows lies within one panel");
  Buffer<double> packed{panels * width * kStepsAChunk}, gram{panels * width * panels * width}, square{r * r};
  double* const upper = square.data;
  const int64_t tiles = (r + kRows - 1) / kRows * (panels + 1) / 2;  // of a chunk, about
  const bool along = s.stride[1] < s.stride[2];                      // whether a column lies in one piece
  const auto ahead = [&](int64_t k) {  // what is packed next: the chunk from k on, or the next factor's first
    const Source* from = k < s.depth ? w + k * s.stride[1] : w + s.stride[0];
    const int64_t left = k < s.depth ? s.depth - k : factor + 1 < s.count ? s.depth : 0;
    const int64_t count = left < kStepsAChunk ? left : kStepsAChunk, size = sizeof(Source);
    return Ahead{.row = reinterpret_cast<const char*>(from),
                 .stride = s.stride[along ? 2 : 1] * size,
                 .width = (along ? count : r) * size,
                 .rows = count == 0 ? 0
                         : along    ? r
                                    : count,
                 .times = tiles};
  };
  const auto tile = [&](int64_t row, int64_t panel) { return gram.data + (row * panels + panel * kRows) * width; };
  for (int64_t k = 0; k < s.depth; k += kStepsAChunk) {
    const int64_t count = s.depth - k < kStepsAChunk ? s.depth - k : kStepsAChunk;
    pack_right<Scheme>(packed.data, w + k * s.stride[1], count, r, s.stride[1], s.stride[2]);
    Ahead next = ahead(k + kStepsAChunk);
    for (int64_t first = 0; first < r; first += kRows)
      for (int64_t panel = first / width; panel < panels; ++panel) {
        const double* block = packed.data + first / width * width * count + first % width;
        const int64_t left = panel == first / width ? first % width / lanes * lanes : 0;
        const int64_t right = r - panel * width < width ? r - panel * width : width;
        double* sums = tile(first, panel) + left;
        next.fetch();
        with_across((right - left + lanes - 1) / lanes, [&](auto across) {
          multiply<Scheme, width, across>(sums, block, packed.data + panel * width * count + left, count,
                                          [&](int row) { return k == 0 ? nullptr : sums + row * width; });
        });
      }
  }
  for (int64_t row = 0; row < r; ++row)
    for (int64_t panel = row / width; panel < panels; ++panel) {
      const int64_t columns = r - panel * width < width ? r - panel * width : width;
      std::memcpy(upper + row * r + panel * width, tile(row / kRows * kRows, panel) + row % kRows * width,
                  static_cast<size_t>(columns) * sizeof(double));
    }
  double largest = 0;
  for (int64_t j = 0; j < r; ++j) largest = upper[j * r + j] > largest ? upper[j * r + j] : largest;
  bool regular = cholesky(upper, r);
  for (int64_t j = 0; j < r && regular; ++j) regular = upper[j * r + j] * upper[j * r + j] > 1e-13 * largest;
  auto* const out = static_cast<Out*>(s.triangles) + factor * r * r;
  for (int64_t n = 0; n < r * r; ++n) out[n] = regular ? static_cast<Out>(upper[n]) : 0;
  s.regular[factor] = regular;
}

}  // namespace

TriangleTask triangles(Kind kind) {
  switch (kind) {
    case Kind::fp32:
      return run<float, float>;
    case Kind::fp64:
      return run<double, double>;
    default:
      return run<BFloat16, float>;
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

namespace fc::cpu {

FC_TIERS(TriangleTask, triangles, Kind)

namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> triangles(const Tensor& factors) {
  STD_TORCH_CHECK(factors.dim() == 3, "factors has shape ", shape_of(factors), ", expected [N, d, r]");
  const Kind kind = kind_of("factors", factors.scalar_type());
  const int64_t N = factors.size(0), d = factors.size(1), r = factors.size(2);
  Tensor out =
      torch::stable::new_empty(factors, {N, r, r}, kind == Kind::fp64 ? ScalarType::Double : ScalarType::Float);
  Tensor regular = torch::stable::new_empty(factors, {N}, ScalarType::Bool);
  const TriangleArguments arguments{.factors = factors.data_ptr(),
                                    .stride = {factors.stride(0), factors.stride(1), factors.stride(2)},
                                    .count = N,
                                    .depth = d,
                                    .rank = r,
                                    .triangles = out.data_ptr(),
                                    .regular = static_cast<bool*>(regular.data_ptr())};
  const TriangleTask task = pick_triangles(kind);
  constexpr int64_t some = 4;  // in a row: each fetches what the next reads
  run_tasks((N + some - 1) / some, [&](int64_t first) {
    for (int64_t i = some * first; i < std::min(N, some * (first + 1)); ++i) task(arguments, i);
  });
  return {out, regular};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("triangles", TORCH_BOX(&fc::cpu::triangles)); }

#endif
