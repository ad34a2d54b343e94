// What the stress programs share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "executor/executor.h"

namespace hybrid {
extern const KernelTable kernels_portable;
}

namespace stress {

using namespace hybrid;

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// Starts on a cache line, as everything in a plan does.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t count) : memory_(count * sizeof(T), false) {}
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }

 private:
  Arena memory_;
};

// Small numbers that differ from place to place: bf16 from -1 to 1.
inline void fill(bf16* values, int count, int seed) {
  for (int i = 0; i < count; ++i) {
    const float value = float((i * 37 + seed * 101) % 65 - 32) / 32.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    values[i] = bf16(bits >> 16);
  }
}

inline int64_t matrix_bytes(int columns, int inputs) { return int64_t(columns) * inputs * 2; }

inline std::shared_ptr<ThreadPool> make_pool(int threads, int nodes) {
  return std::make_shared<ThreadPool>(threads, std::vector<std::vector<int>>{}, nodes);
}

// For steps of at most `rows` rows of one sequence.
inline Limits limits_of(int rows) {
  Limits limits{};
  limits.rows = limits.positions = rows;
  limits.sequences = limits.vocab = 1;
  limits.scratch_bytes = 1 << 18;
  return limits;
}

inline Outcome run_step(Executor& executor, int rows) {
  std::vector<int32_t> zeros(size_t(rows), 0), positions(size_t(rows), 0);
  for (int i = 0; i < rows; ++i) positions[size_t(i)] = i;
  Step step{};
  step.rows = rows;
  step.tokens = step.sequences = zeros.data();
  step.positions = positions.data();
  Times times;
  return executor.step(step, times, nullptr);
}

}  // namespace stress
