// Selection for factored_topk: of the entries that the search lets through, which are the k best.
//
// Entries are ordered by value, then by place, so that the best k are the same whatever the threads and the blocking.
// Their threshold is the k-th best entry known: it only rises, and what is not better never belongs.
#pragma once

#include <cstdint>

namespace fc::cpu {

struct Entry {
  double value;   // times `sign`: more is better
  int64_t place;  // row * M + column
};

// NaN is worse than everything else.
static inline bool better(const Entry& a, const Entry& b) {
  if (a.value > b.value) return true;
  if (a.value < b.value) return false;
  const bool nan = a.value != a.value, other = b.value != b.value;
  return nan != other ? other : a.place < b.place;
}

// Entries that may belong: of one row, or of all rows of a task.
struct Candidates {
  Entry* entries;
  int64_t count;
  Entry threshold;  // the k-th best known; NaN, in the last place, while fewer than k are
};

}  // namespace fc::cpu

#ifndef FC_TIER

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

namespace fc::cpu {

inline constexpr int64_t kInserted = 64;  // k up to which the candidates of a row are inserted one by one
inline constexpr Entry kNone{std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<int64_t>::max()};
inline constexpr auto kBetter = [](const Entry& a, const Entry& b) {
  return better(a, b);
};  // a function isn't inlined

// Moves the best k to the front, the k-th last and the others in no order, and returns how many there are.
inline int64_t keep_best(Entry* entries, int64_t count, int64_t k) {
  if (count < k) return count;
  std::nth_element(entries, entries + k - 1, entries + count, kBetter);
  return k;
}

// The same, in order; the first `kept` entries are the best of earlier calls. With a small k, taking every candidate in
// at once gives the closest threshold.
inline int64_t insert_best(Entry* entries, int64_t kept, int64_t count, int64_t k) {
  for (int64_t i = kept; i < count; ++i) {
    const Entry entry = entries[i];
    if (kept == k && !better(entry, entries[k - 1])) continue;
    int64_t j = kept < k ? kept++ : k - 1;
    for (; j > 0 && better(entry, entries[j - 1]); --j) entries[j] = entries[j - 1];
    entries[j] = entry;
  }
  return kept;
}

// Makes room among the candidates of one row; the search calls it when they are many. context: k.
inline void keep_in_row(void* context, Candidates& found) {
  const int64_t k = *static_cast<const int64_t*>(context);
  const int64_t ordered = found.threshold.place == kNone.place ? 0 : k;
  found.count =
      k <= kInserted ? insert_best(found.entries, ordered, found.count, k) : keep_best(found.entries, found.count, k);
  if (found.count == k) found.threshold = found.entries[k - 1];
}

// The candidates of the whole matrix, to which all threads add theirs.
class Pool {
 public:
  Pool(int64_t k, int64_t added) : k(k) { entries.reserve(static_cast<size_t>(2 * k + added)); }

  void add(Candidates& found) {
    const std::lock_guard lock(mutex);
    entries.insert(entries.end(), found.entries, found.entries + found.count);
    found.count = 0;
    if (static_cast<int64_t>(entries.size()) >= 2 * k) shrink();
    found.threshold = threshold;
  }

  // The best k, in order, once all threads have added theirs.
  const std::vector<Entry>& best() {
    shrink();
    std::sort(entries.begin(), entries.end(), kBetter);
    return entries;
  }

  int64_t times_raised = 0;  // the threshold; threads read it without the lock

 private:
  void shrink() {
    entries.resize(static_cast<size_t>(keep_best(entries.data(), static_cast<int64_t>(entries.size()), k)));
    if (!better(entries.back(), threshold)) return;
    threshold = entries.back();
    __atomic_fetch_add(&times_raised, 1, __ATOMIC_RELAXED);
  }

  const int64_t k;
  std::vector<Entry> entries;
  Entry threshold = kNone;
  std::mutex mutex;
};

// Empties a task's candidates into the pool. context: the Pool.
inline void add_to_pool(void* context, Candidates& found) { static_cast<Pool*>(context)->add(found); }

}  // namespace fc::cpu

#endif
