// factored_topk on the CPU: its arguments are checked, the search is cut into tasks and their entries become one list;
// factored_topk_search.h searches, topk_selection.h keeps the best.
#include "factored_topk_search.h"

#ifndef FC_TIER  // the torch-facing half

#include <memory>

namespace fc::cpu {

FC_TIERS(const TopkKernels*, topk_kernels, Arithmetic)

namespace {

constexpr int64_t kCollected = kWidestPanel;    // entries collected between two calls of make_room(): a tile's row
constexpr int64_t kRowsBytes = 16 << 20;        // of all candidates of a per-row task
constexpr int64_t kScreenedEntriesAWin = 4096;  // a screen pays where fewer than one entry in so many is wanted

// Where results lie: [k], or [N,k].
template <class T>
struct Results {
  T* values;
  int64_t *rows, *columns;
  double sign;
  int64_t width;  // M

  void write(int64_t i, const Entry& entry) const {
    values[i] = static_cast<T>(sign * entry.value + 0.0);  // no -0.0
    rows[i] = entry.place / width;
    columns[i] = entry.place % width;
  }
  Entry read(int64_t i) const { return {sign * static_cast<double>(values[i]), rows[i] * width + columns[i]}; }
};

// A list for each task, emptied into a pool that all tasks share.
template <class T>
void search_all(TopkArguments& s, const TopkKernels& kernels, int64_t k, const Results<T>& results) {
  s.capacity = std::clamp<int64_t>(2 * k, 64, 2048) + kCollected;
  Pool pool(k, s.capacity);
  s.make_room = add_to_pool;
  s.context = &pool;
  s.times_raised = &pool.times_raised;
  stream(kernels, s, kMostRows, [&](const Stripe& stripe, int64_t first, int64_t end) {
    const std::unique_ptr<Entry[]> entries(new Entry[static_cast<size_t>(s.capacity)]);
    Candidates found{entries.get(), 0, kNone};
    kernels.search(s, stripe, first, end, &found);
    pool.add(found);
  });
  const std::vector<Entry>& best = pool.best();
  for (int64_t i = 0; i < k; ++i) results.write(i, best[static_cast<size_t>(i)]);
}

// A list for each row of a task. What earlier stripes found in a row is read back from the results to begin with.
template <class T>
void search_rows(TopkArguments& s, const TopkKernels& kernels, int64_t k, const Results<T>& results) {
  const int64_t never = 0;
  s.capacity = std::min(k <= kInserted ? k : 2 * k, s.product.columns) + kCollected;
  s.make_room = keep_in_row;
  s.context = &k;
  s.times_raised = &never;
  const int64_t held = s.capacity * static_cast<int64_t>(sizeof(Entry));
  const int64_t most_rows = std::max<int64_t>(8, kRowsBytes / held / 8 * 8);
  stream(kernels, s, most_rows, [&](const Stripe& stripe, int64_t first, int64_t end) {
    const std::unique_ptr<Entry[]> entries(new Entry[static_cast<size_t>((end - first) * s.capacity)]);
    std::vector<Candidates> found;
    for (int64_t row = first; row < end; ++row) {
      found.push_back({entries.get() + (row - first) * s.capacity, std::min(k, stripe.first), kNone});
      Candidates& mine = found.back();
      for (int64_t i = 0; i < mine.count; ++i) mine.entries[i] = results.read(row * k + i);
      if (mine.count == k) mine.threshold = mine.entries[k - 1];
    }
    kernels.search(s, stripe, first, end, found.data());
    for (int64_t row = first; row < end; ++row) {
      Candidates& mine = found[static_cast<size_t>(row - first)];
      mine.count = keep_best(mine.entries, mine.count, k);
      std::sort(mine.entries, mine.entries + mine.count, kBetter);
      for (int64_t i = 0; i < mine.count; ++i) results.write(row * k + i, mine.entries[i]);
    }
  });
}

const TopkKernels& kernels_of(const Tensor& A, const std::string& screen, bool pays) {
  FC_CHECK(screen == "auto" || screen == "none" || screen == "bf16", "screen is '", screen,
           "', expected 'auto', 'none' or 'bf16'");
  const Arithmetic exact = arithmetic_of("A", A);
  const bool forced = screen == "bf16", single = exact == Arithmetic::fp32;
  FC_CHECK(!forced || single, "screen is 'bf16' but A is ", exact == Arithmetic::fp64 ? "float64" : "bfloat16",
           "; a screen in bfloat16 is for float32 factors");
  const bool wanted = forced || (screen == "auto" && pays && single);
  const TopkKernels* screened = wanted ? pick_topk_kernels(Arithmetic::fp32_by_bf16) : nullptr;
  if (forced) check_instructions(screened != nullptr, "screen");
  return *(screened != nullptr ? screened : pick_topk_kernels(exact));
}

std::tuple<Tensor, Tensor, Tensor> factored_topk(const Tensor& A, const Tensor& B, int64_t k, bool largest,
                                                 bool per_row, const std::optional<Tensor>& shift,
                                                 const std::string& screen) {
  Sizes sizes = check_product(A, B);
  sizes("shift", shift, "N", Kind::number);
  const Product p = product_of(A, B);
  const int64_t most = per_row ? p.columns : p.rows * p.columns;
  FC_CHECK(k >= 1 && k <= most, "k is ", k, ", expected 1 to ", most);
  const bool pays = !per_row && k <= p.rows * p.columns / kScreenedEntriesAWin;
  const TopkKernels& kernels = kernels_of(A, screen, pays);
  const ScalarType dtype = result_dtype(A);
  const std::optional<Tensor> shift_c = contiguous_as(shift, dtype);

  const std::vector<int64_t> size = per_row ? std::vector<int64_t>{p.rows, k} : std::vector<int64_t>{k};
  Tensor values = torch::stable::new_empty(A, size, dtype);
  Tensor rows = torch::stable::new_empty(A, size, ScalarType::Long);
  Tensor columns = torch::stable::new_empty(A, size, ScalarType::Long);
  TopkArguments arguments{
      .product = p, .shift = data_of<const void>(shift_c), .sign = largest ? 1.0 : -1.0, .per_row = per_row};
  const auto run = [&]<class T>(T* out) {
    const Results<T> results{out, data_of<int64_t>(rows), data_of<int64_t>(columns), arguments.sign, p.columns};
    if (per_row)
      search_rows(arguments, kernels, k, results);
    else
      search_all(arguments, kernels, k, results);
  };
  if (dtype == ScalarType::Double)
    run(data_of<double>(values));
  else
    run(data_of<float>(values));
  return {values, rows, columns};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("factored_topk", TORCH_BOX(&fc::cpu::factored_topk)); }

#endif
