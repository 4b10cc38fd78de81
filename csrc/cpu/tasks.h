// Work shared among torch's threads. For the torch-facing halves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "scratch.h"

namespace fc::cpu {

// Calls task(i, scratch) for all tasks. Each thread takes the next task when it is done with one, so that tasks may
// differ in length. The scratch, so many bytes aligned for vectors, is a thread's own.
template <class Task>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const Task& task) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t size = (scratch_bytes + 63) / 64 * 64;
  const HugeScratch scratches(size * threads);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i; (i = next++) < tasks;) task(i, static_cast<char*>(scratches.data()) + thread * size);
  });
}

// The same of tasks without a scratch: task(i).
template <class Task>
void run_tasks(int64_t tasks, const Task& task) {
  run_tasks(tasks, 0, [&](int64_t i, void*) { task(i); });
}

}  // namespace fc::cpu
