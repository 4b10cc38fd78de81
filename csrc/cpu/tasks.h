// Work shared among torch's threads. For the torch-facing halves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

#include "interrupts.h"
#include "scratch.h"

namespace fc::cpu {

// The first thing that a thread threw. It is thrown again where all threads have ended, since torch would put words of
// its own around what leaves its parallel_for.
class Failure {
 public:
  std::atomic<bool> any{false};

  void keep() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!any.exchange(true)) first = std::current_exception();
  }
  void rethrow() const {
    if (first) std::rethrow_exception(first);
  }

 private:
  std::mutex mutex;
  std::exception_ptr first;
};

// Calls task(i, scratch) for all tasks. Each thread takes the next task when it is done with one, so that tasks may
// differ in length. The scratch, so many bytes aligned for vectors, is a thread's own. If a task throws or the user
// interrupts, the tasks that are left are not begun.
template <class Task>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const Task& task) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t size = (scratch_bytes + 63) / 64 * 64;
  const HugeScratch scratches(size * threads);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> next{0};
  Failure failure;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    std::optional<Helper> helper;
    if (std::this_thread::get_id() != caller) helper.emplace(failure.any);
    try {
      for (int64_t i; !failure.any && (i = next++) < tasks;) {
        look_for_interrupt();
        task(i, static_cast<char*>(scratches.data()) + thread * size);
      }
    } catch (...) {
      failure.keep();
    }
  });
  failure.rethrow();
}

// The same of tasks without a scratch: task(i).
template <class Task>
void run_tasks(int64_t tasks, const Task& task) {
  run_tasks(tasks, 0, [&](int64_t i, void*) { task(i); });
}

}  // namespace fc::cpu
