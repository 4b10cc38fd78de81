// How the torch-facing half of an op reaches its kernels: the kind of arithmetic, the tier in force, tasks on threads.
#pragma once

namespace fc::cpu {

// What the inputs are and how they are multiplied; "by_bf16": both factors rounded to bfloat16.
enum class Kind { fp32, fp64, bf16_inputs, fp32_by_bf16, bf16_by_bf16 };

}  // namespace fc::cpu

#ifndef FC_TIER

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "../check.h"
#include "isa.h"

// Declares `Result name(Argument)` of every tier, and pick_name(argument), which calls that of the tier in force. To be
// used in namespace fc::cpu.
#define FC_DECLARE_OF_TIER(tier, Result, name, Argument) \
  namespace tier {                                       \
  Result name(Argument);                                 \
  }
#define FC_CASE_OF_TIER(tier, name) \
  case Tier::tier:                  \
    return tier::name(argument);
#define FC_TIERS(Result, name, Argument)                                        \
  FC_FOR_EACH_TIER(FC_DECLARE_OF_TIER, Result, name, Argument)                  \
  static Result pick_##name(Argument argument) {                                \
    switch (current_tier()) {                                                   \
      FC_FOR_EACH_TIER(FC_CASE_OF_TIER, name)                                   \
      default:                                                                  \
        STD_TORCH_CHECK(false, "this build has no code for the tier in force"); \
    }                                                                           \
  }

namespace fc::cpu {

inline Kind kind_of(const char* name, torch::headeronly::ScalarType dtype, bool rounded = false) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return rounded ? Kind::fp32_by_bf16 : Kind::fp32;
    case ScalarType::BFloat16:
      return rounded ? Kind::bf16_by_bf16 : Kind::bf16_inputs;
    case ScalarType::Double:
      STD_TORCH_CHECK(!rounded, "precision is 'bf16' but ", name, " is float64; pass float32 or bfloat16");
      return Kind::fp64;
    default:
      STD_TORCH_CHECK(false, name, " has an unsupported dtype; expected float32, float64 or bfloat16");
  }
}

inline Kind kind_of(const char* name, torch::headeronly::ScalarType dtype, const std::string& precision) {
  const bool rounded = precision == "bf16";
  STD_TORCH_CHECK(rounded || precision == "ieee", "precision is '", precision,
                  "', expected 'ieee' or 'bf16' on the CPU");
  return kind_of(name, dtype, rounded);
}

inline void check_instructions(bool found, const char* what) {
  STD_TORCH_CHECK(found, what, "='bf16' needs a CPU with AVX-512 BF16 instructions; the tier in force is ",
                  kTierNames[static_cast<int>(current_tier())]);
}

// Each thread takes the next task when it is done with one: tasks need not be equal.
template <class Task>
void run_tasks(int64_t tasks, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < tasks;) task(i);
  });
}

// Scratch that all threads share, aligned for vectors.
struct Shared {
  explicit Shared(int64_t bytes) : storage(new char[static_cast<size_t>(bytes) + 64]) {}
  void* data() const { return storage.get() + (64 - reinterpret_cast<uintptr_t>(storage.get()) % 64); }
  std::unique_ptr<char[]> storage;
};

}  // namespace fc::cpu

#endif
