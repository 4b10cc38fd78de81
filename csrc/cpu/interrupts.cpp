// Where Python says whether the user has interrupted an op.
#include "interrupts.h"

#ifndef FC_TIER

#include <chrono>
#include <stdexcept>

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kBetweenQuestions{50};

std::atomic<void (*)()> ask_python{nullptr};
thread_local const std::atomic<bool>* helped = nullptr;  // whether what this thread helps with has stopped
thread_local Clock::time_point asked = Clock::now();

}  // namespace

// Python hands over a function here that throws what a signal's handler raised. It returns at once on all threads but
// Python's main one, which alone handles signals.
extern "C" [[gnu::visibility("default")]] void pyfastcircuits_ask_python_with(void (*function)()) {
  ask_python = function;
}

namespace fc::cpu {

void look_for_interrupt() {
  if (helped != nullptr) {
    if (helped->load(std::memory_order_relaxed)) throw std::runtime_error("interrupted");
    return;
  }
  const auto now = Clock::now();
  if (now - asked < kBetweenQuestions) return;
  asked = now;
  if (auto* const ask = ask_python.load()) ask();
}

Helper::Helper(const std::atomic<bool>& stopped) : before(helped) { helped = &stopped; }
Helper::~Helper() { helped = before; }

}  // namespace fc::cpu

#endif
