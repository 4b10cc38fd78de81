// Work shared among torch's threads, and the scratch they share. For the torch-facing halves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fc::cpu {

// Each thread takes the next task when it is done with one: for tasks of unequal length. task(i, slot): no two tasks
// run in one slot, below the number of threads, at a time.
template <class Task>
void run_tasks(int64_t tasks, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1,
                              [&]([[maybe_unused]] int64_t slot, int64_t) {
                                for (int64_t i; (i = next++) < tasks;) {
                                  if constexpr (std::is_invocable_v<Task, int64_t, int64_t>)
                                    task(i, slot);
                                  else
                                    task(i);
                                }
                              });
}

// Aligned for vectors; in huge pages where it is large, since taking tens of megabytes in small ones costs
// milliseconds.
struct Shared {
  explicit Shared(int64_t bytes) {
    constexpr size_t huge = 2 << 20;
    const size_t alignment = static_cast<size_t>(bytes) < 2 * huge ? 64 : huge;
    const size_t size = (static_cast<size_t>(bytes) + alignment) / alignment * alignment;
    storage.reset(std::aligned_alloc(alignment, size));
    if (storage == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == huge) madvise(storage.get(), size, MADV_HUGEPAGE);
#endif
  }
  void* data() const { return storage.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> storage;
};

}  // namespace fc::cpu
