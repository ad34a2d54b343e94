#pragma once

#include <algorithm>
#include <chrono>

namespace hybrid {

// How long one thread spins before it sleeps. It learns: waits that would have been short enough to spin through make
// it more patient, little by little. A long one makes it impatient at once: who is waited for so long has lost its
// core, and spinning takes the time of this one from whoever could use it.
class Patience {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::duration;

  Time limit() const { return limit_; }
  void learn(Time waited) {
    if (waited > kMost)
      limit_ = std::max(kLeast, limit_ / 4);
    else if (2 * waited > limit_)
      limit_ = std::min(kMost, limit_ + limit_ / 8);
  }

 private:
  static constexpr Time kLeast = std::chrono::microseconds(2), kMost = std::chrono::microseconds(500);
  Time limit_ = std::chrono::microseconds(50);
};

}  // namespace hybrid
