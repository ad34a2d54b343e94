// What every check uses: random numbers, bf16, and sums in double precision with how far fp32 may stray from them.
//
// Nothing here is taken from the kernels. A bound follows from unit roundoffs and norms: a sum of k products in fp32 is
// off by k * 2^-24 * |x| . |w| at most, a value stored as bf16 by 2^-8 of itself.
#pragma once

#include "bare.h"

namespace reference {

constexpr double kFp32 = 0x1p-24, kBf16 = 0x1p-8;

inline double magnitude(double x) { return x < 0 ? -x : x; }

// The same sequence for the same seed.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  int below(int limit) { return int(bits() % uint32_t(limit)); }
  float uniform() { return float(int32_t(bits())) * 0x1p-31f; }  // in [-1, 1]

 private:
  uint64_t state_;
};

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// e^x for |x| < 700: (e^(x / 1024))^1024, the inner one by its series.
inline double exponential(double x) {
  const double small = x / 1024;
  double sum = 1, term = 1;
  for (int i = 1; i < 12; ++i) sum += term *= small / i;
  for (int i = 0; i < 10; ++i) sum *= sum;
  return sum;
}

// A number that is right if it lies within `bound` of `value`.
struct Near {
  double value = 0, bound = 0;

  void add(double x) {
    value += x;
    bound += kFp32 * (magnitude(value) + bound);
  }
  void round_to_bf16() { bound += kBf16 * (magnitude(value) + bound); }
};

// The product of two rows of `count` numbers, a multiple of 8: as many sums, so that it is fast in emulation.
inline Near dot(const double* x, const double* w, int count) {
  double sums[8] = {}, sizes[8] = {};
  for (int i = 0; i < count; i += 8)
    for (int lane = 0; lane < 8; ++lane) {
      const double term = x[i + lane] * w[i + lane];
      sums[lane] += term;
      sizes[lane] += magnitude(term);
    }
  Near total;
  for (int lane = 0; lane < 8; ++lane) total.value += sums[lane], total.bound += sizes[lane];
  total.bound *= (count + 8) * kFp32;
  return total;
}

// silu(gate) * up as the kernels' fp32 may compute it; the slope of silu is at most 1.1.
inline Near silu_times(const Near& gate, const Near& up) {
  const double silu = gate.value / (1 + exponential(-gate.value)), value = silu * up.value;
  const double inputs = 1.1 * gate.bound * (magnitude(up.value) + up.bound) + magnitude(silu) * up.bound;
  return {value, inputs + 12 * kFp32 * magnitude(value)};
}

// gate * sigmoid(1.702 gate) * (up + 1), gate at most 7 and up within 7.
inline Near swiglu_clamped(const Near& gate, const Near& up) {
  const double g = gate.value > 7 ? 7 : gate.value, u = (up.value > 7 ? 7 : up.value < -7 ? -7 : up.value) + 1;
  const double swish = g / (1 + exponential(-1.702 * g)), value = swish * u;
  const double inputs = 1.1 * gate.bound * (magnitude(u) + up.bound) + magnitude(swish) * up.bound;
  return {value, inputs + 16 * kFp32 * magnitude(swish) * (magnitude(u) + 1)};
}

// Counts what lies out of bounds and remembers the worst.
class Comparison {
 public:
  void see(const Near& expected, double actual, int row, int column) {
    const double error = magnitude(actual - expected.value);
    if (error <= expected.bound) return;
    ++wrong_;
    if (worst_.error > 0 && error <= worst_.error) return;
    worst_ = {error, actual, expected, row, column};
  }

  // Prints a line that begins with `parts` if anything was wrong. Returns whether all was right.
  template <class... Parts>
  bool passed(const Parts&... parts) const {
    if (!wrong_) return true;
    console::line(parts..., ": ", wrong_, " wrong; at row ", worst_.row, ", column ", worst_.column, " ", worst_.actual,
                  ", expected ", worst_.expected.value, " within ", worst_.expected.bound);
    return false;
  }

 private:
  struct Worst {
    double error = 0, actual = 0;
    Near expected;
    int row = 0, column = 0;
  };

  int wrong_ = 0;
  Worst worst_;
};

}  // namespace reference
