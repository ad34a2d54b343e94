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
  return std::make_shared<ThreadPool>(threads, std::vector<int>{}, nodes);
}

}  // namespace stress
