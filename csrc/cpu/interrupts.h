// How the user's Ctrl-C ends an op: kernels and the hand-out of tasks look for it between pieces of work.
#pragma once

#include <atomic>

namespace fc::cpu {

// Throws if the op that this thread works on is to end. Of its threads, the one that called it asks Python, at most
// every 50 ms; the others learn what became of that. To be called outside hot loops, several times a second.
void look_for_interrupt();

// While this lives, the thread helps with an op: it ends where `stopped` is set, and asks nobody.
class Helper {
 public:
  explicit Helper(const std::atomic<bool>& stopped);
  ~Helper();
  Helper(const Helper&) = delete;
  Helper& operator=(const Helper&) = delete;

 private:
  const std::atomic<bool>* const before;
};

}  // namespace fc::cpu
