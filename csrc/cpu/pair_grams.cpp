// pair_grams on the CPU: ||X_i Y_j||^2 as the inner product of the Gram matrices X_i^T X_i and Y_j Y_j^T. Both are
// symmetric [d,d], so for d < r s it is less work than the product; their tiles are made and consumed where they are
// needed, never stored whole. Of the squares they are cut into, those on and below the diagonal are made.
// Sums run in an order that depends on the shapes alone: results do not depend on threads.
#include "gram_kernels.h"

#ifdef FC_TIER

namespace fc::cpu::FC_TIER {

const GramKernels* gram_kernels(Arithmetic arithmetic) { return select<Grams, Dots::none>(arithmetic); }

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "../plan.h"
#include "scratch.h"

namespace fc::cpu {

FC_TIERS(const GramKernels*, gram_kernels, Arithmetic)

namespace {

// Gram matrices are summed in groups of units, each with partial sums of its own that are added in order: the number of
// groups decides the order of the sums, so it depends on the shapes alone. At most kMostGroups, whose partial sums take
// no more than kPartialSums numbers (64 MiB).
constexpr int64_t kMostGroups = 32, kPartialSums = 8 << 20;

// row, entry: which of the factors' dimensions are the rows and the entries of X.
GramFactors factors_of(const char* name, const Tensor& factors, const Tensor* outer, int row, int entry) {
  GramFactors f{.factors = factors.data_ptr(),
                .outer = nullptr,
                .stride = {factors.stride(0), factors.stride(row), factors.stride(entry)},
                .outer_stride = {},
                .count = factors.size(0),
                .shared = 1,
                .inner = factors.size(row)};
  if (outer == nullptr) return f;
  STD_TORCH_CHECK(outer->dim() == 3 && outer->size(entry) == f.inner &&
                      outer->size(0) % std::max<int64_t>(f.count, 1) == 0 && (f.count > 0 || outer->size(0) == 0),
                  name, "_outer has shape ", shape_of(*outer), ", which does not fit ", name, " ", shape_of(factors));
  STD_TORCH_CHECK(outer->scalar_type() == factors.scalar_type(), name, "_outer and ", name, " differ in dtype");
  f.outer = outer->data_ptr();
  f.shared = outer->size(0) / std::max<int64_t>(f.count, 1);
  f.count = outer->size(0);
  const int64_t strides[] = {outer->stride(0), outer->stride(row), outer->stride(entry)};
  std::copy(strides, strides + 3, f.outer_stride);
  return f;
}

// One side, and the parts it points at.
struct Side : GramSide {
  Side(const char* name, const std::vector<Tensor>& factors, const std::vector<Tensor>& outers, int row, int entry)
      : GramSide{} {
    STD_TORCH_CHECK(outers.empty() || outers.size() == factors.size(), name, "_outer has ", outers.size(),
                    " tensors, but ", name, " has ", factors.size());
    for (size_t i = 0; i < factors.size(); ++i) {
      const Tensor& f = factors[i];
      const Tensor* outer = outers.empty() ? nullptr : &outers[i];
      STD_TORCH_CHECK(f.dim() == 3, name, " has shape ", shape_of(f), ", expected three dimensions");
      STD_TORCH_CHECK(f.scalar_type() == factors[0].scalar_type(), "the tensors of ", name, " differ in dtype");
      held.push_back(factors_of(name, f, outer, row, entry));
      const int64_t rank_here = (outer == nullptr ? f : *outer).size(row), depth_here = f.size(entry);
      if (i == 0) rank = rank_here, depth = depth_here;
      STD_TORCH_CHECK(rank_here == rank && depth_here == depth, "the tensors of ", name, " differ in shape");
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
  STD_TORCH_CHECK(!right.empty(), "right is empty, expected at least one tensor");
  const std::vector<Tensor> left_outers =
      left_outer.has_value() ? std::vector<Tensor>{*left_outer} : std::vector<Tensor>{};
  const Side lefts("left", {left}, left_outers, 1, 2), rights("right", right, right_outer, 2, 1);
  STD_TORCH_CHECK(lefts.depth == rights.depth, "left has shape ", shape_of(left), " and right ", shape_of(right[0]),
                  ": their d differ");
  check_dtypes("left and right", {left, right[0]});
  const int64_t N = lefts.count, M = rights.count;
  Sizes sizes;
  sizes("before", before, std::to_string(M), ScalarType::Long);
  const GramKernels& kernels = *pick_gram_kernels(arithmetic_of("left", left.scalar_type()));

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
    const int64_t scratch = (kernels.scratch_bytes(g) + 63) / 64 * 64;
    const HugeScratch scratches(scratch * torch::stable::get_num_threads());
    run_tasks(groups, [&](int64_t i, int64_t slot) {
      double* sums = partial + i * size;
      std::fill(sums, sums + size, 0.0);
      kernels.grams(g, packed_left.data(), packed_right.data(), {first_unit(i), first_unit(i + 1)},
                    {sums, sums + N * M}, static_cast<char*>(scratches.data()) + slot * scratch);
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
