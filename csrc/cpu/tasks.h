// Work shared among torch's threads. For the torch-facing halves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

namespace fc::cpu {

// Calls task(i), or task(i, slot), for all tasks. Each thread takes the next task when it is done with one, so that
// tasks may differ in length. Slots are numbered below the number of threads, and no two tasks run in one slot at a
// time.
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

}  // namespace fc::cpu
