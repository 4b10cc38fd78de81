// triangles on the CPU: for each factor W the upper triangle R with R^T R = W^T W, which stands for W where only norms
// matter. Each Gram matrix W^T W is made in fp64, a chunk of the depth at a time, and factored by Cholesky. Rounding in
// fp64 leaves Cholesky's squared condition number harmless to fp32 factors; LAPACK's QR of a tall factor takes longer
// than all that is done with the result.
//
// Why not torch.linalg.cholesky_ex(W64.mT @ W64, upper=True) of fp64 copies W64? Measured in one process, in turn,
// medians of 25, AVX2, one thread: it takes 4.9 times as long for W [144,768,64] and 4.1 times for [32,4096,128], which
// makes a whole composition_scores call of GPT-2 small's shape 1.35 times as long. Gram matrices made here and factored
// by torch.linalg.cholesky_ex would take 1.1 times as long as this op, and round differently.
#include "dispatch.h"

namespace fc::cpu {

struct TriangleArguments {
  Strided<3> factors;  // [N,d,r]
  int64_t count, depth, rank;
  void* triangles;  // [N,r,r], upper; fp64 for fp64 factors, else fp32
  bool* regular;    // [N]
};

using TriangleTask = void (*)(const TriangleArguments&, int64_t factor);

}  // namespace fc::cpu

#ifdef FC_TIER

#include <cmath>

namespace fc::cpu::FC_TIER {
namespace {

// Inner indices multiplied together: at r = 64, all columns of a chunk fill the smallest L1 cache.
constexpr int64_t kStepsAChunk = 64;
static_assert(kStepsAChunk * 64 * 8 <= kSmallestL1);

// Replaces the upper half of A by R with R^T R = A; returns whether A is positive definite. Rows are worked on from the
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

template <class Scheme, class Source>
struct Triangle {
  using Out = typename Scheme::Accumulator;
  using Wide = Ieee<double>;
  static constexpr int width = kWidth<Wide>, lanes = kLanes<double>;
  static_assert(width % kRows == 0, "a block of rows lies within one panel");

  static void make(const TriangleArguments& s, int64_t factor) {
    const int64_t r = s.rank, panels = panels_of<Wide>(r);
    const auto* w = static_cast<const Source*>(s.factors.data) + factor * s.factors.stride[0];
    Buffer<double> packed{panels * width * kStepsAChunk}, gram{panels * width * panels * width}, square{r * r};
    double* const upper = square.data;
    const int64_t tiles = (r + kRows - 1) / kRows * (panels + 1) / 2;  // of a chunk, about
    const bool along = s.factors.stride[1] < s.factors.stride[2];      // whether a column lies in one piece
    const auto prefetch = [&](int64_t k) {  // of the chunk from k on, or of the next factor's first
      const Source* from = k < s.depth ? w + k * s.factors.stride[1] : w + s.factors.stride[0];
      const int64_t left = k < s.depth ? s.depth - k : factor + 1 < s.count ? s.depth : 0;
      const int64_t count = smaller(left, kStepsAChunk), size = sizeof(Source);
      return Prefetch{.row = reinterpret_cast<const char*>(from),
                      .stride = s.factors.stride[along ? 2 : 1] * size,
                      .width = (along ? count : r) * size,
                      .rows = along ? r : count,
                      .calls = tiles};
    };
    const auto tile = [&](int64_t row, int64_t panel) { return gram.data + (row * panels + panel * kRows) * width; };
    for (int64_t k = 0; k < s.depth; k += kStepsAChunk) {
      const int64_t count = smaller(s.depth - k, kStepsAChunk);
      pack_right<Wide>(packed.data, w + k * s.factors.stride[1], count, r, s.factors.stride[1], s.factors.stride[2]);
      Prefetch next = prefetch(k + kStepsAChunk);
      for (int64_t first = 0; first < r; first += kRows)
        for (int64_t panel = first / width; panel < panels; ++panel) {
          const double* block = packed.data + first / width * width * count + first % width;
          const int64_t left = panel == first / width ? first % width / lanes * lanes : 0;
          const int64_t right = smaller(r - panel * width, width);
          double* sums = tile(first, panel) + left;
          next.fetch();
          with_across((right - left + lanes - 1) / lanes, [&](auto across) {
            multiply<Wide, width, across>(sums, block, packed.data + panel * width * count + left, count,
                                          [&](int row) { return k == 0 ? nullptr : sums + row * width; });
          });
        }
    }
    for (int64_t row = 0; row < r; ++row)
      for (int64_t panel = row / width; panel < panels; ++panel) {
        const int64_t columns = smaller(r - panel * width, width);
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
  static TriangleTask kernels() { return make; }
};

}  // namespace

TriangleTask triangles(Arithmetic arithmetic) { return select<Triangle, Dots::none>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

FC_TIERS(TriangleTask, triangles, Arithmetic)

namespace {

std::tuple<Tensor, Tensor> triangles(const Tensor& factors) {
  Sizes sizes;
  sizes("factors", factors, "N d r");
  const int64_t N = sizes["N"], d = sizes["d"], r = sizes["r"];
  const TriangleTask task = pick_triangles(arithmetic_of("factors", factors));
  Tensor out = torch::stable::new_empty(factors, {N, r, r}, result_dtype(factors));
  Tensor regular = torch::stable::new_empty(factors, {N}, ScalarType::Bool);
  const TriangleArguments arguments{strided<3>(factors), N, d, r, out.data_ptr(), data_of<bool>(regular)};
  if (d == 0 || r == 0) {  // no entry to make a triangle of; a matrix without rows is regular
    std::fill_n(arguments.regular, N, r == 0);
    return {torch::stable::new_zeros(factors, {N, r, r}, result_dtype(factors)), regular};
  }
  constexpr int64_t some = 4;  // in a row: each fetches what the next reads
  run_tasks((N + some - 1) / some, [&](int64_t first) {
    for (int64_t i = some * first; i < std::min(N, some * (first + 1)); ++i) {
      look_for_interrupt();
      task(arguments, i);
    }
  });
  return {out, regular};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("triangles", TORCH_BOX(&fc::cpu::triangles)); }

#endif
