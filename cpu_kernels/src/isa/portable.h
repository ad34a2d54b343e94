// Plain C++ over sixteen lanes: runs anywhere, and is the reference that the others are tested against.
#pragma once

#include "executor/args.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Portable {
  struct F32 {
    float lane[16];
  };
  struct Line {
    F32 even, odd;
  };
  struct Pair {
    float even, odd;
  };
  static constexpr int max_rows = 4;
  static constexpr int max_blocks = 2;

  template <class Function>
  static F32 each(Function function) {
    F32 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = function(i);
    return out;
  }
  static F32 zero() { return set(0.0f); }
  static F32 set(float x) {
    return each([=](int) { return x; });
  }
  static F32 load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, F32 x) {
    for (int i = 0; i < 16; ++i) p[i] = x.lane[i];
  }
  static F32 add(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F32 sub(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F32 mul(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F32 div(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F32 fma(F32 a, F32 b, F32 c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static F32 max(F32 a, F32 b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F32 round(F32 x) {
    // Adding and taking away 1.5 * 2^23 rounds to nearest even for |x| < 2^22, which is all that exp asks for.
    return each([&](int i) { return (x.lane[i] + 12582912.0f) - 12582912.0f; });
  }
  static F32 times_power_of_two(F32 x, F32 n) {
    return each([&](int i) { return x.lane[i] * bits_to_float(uint32_t(int(n.lane[i]) + 127) << 23); });
  }
  static float sum(F32 x) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x.lane[i] += x.lane[i + width];
    return x.lane[0];
  }
  static float largest(F32 x) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x.lane[i] = x.lane[i] > x.lane[i + width] ? x.lane[i] : x.lane[i + width];
    return x.lane[0];
  }
  static F32 keep(F32 x, int first, int last, float other) {
    return each([&](int i) { return i >= first && i < last ? x.lane[i] : other; });
  }
  static void store_bf16(bf16* p, F32 x) {
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &x.lane[i], sizeof bits);
      p[i] = bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  }

  static Line load_line(const char* p) {
    uint32_t pairs[16];
    __builtin_memcpy(pairs, p, sizeof pairs);
    return {each([&](int i) { return bits_to_float(pairs[i] << 16); }),
            each([&](int i) { return bits_to_float(pairs[i] & 0xffff0000u); })};
  }
  static Pair load_pair(const bf16* p) {
    return {bits_to_float(uint32_t(p[0]) << 16), bits_to_float(uint32_t(p[1]) << 16)};
  }
  static F32 dot(F32 acc, const Line& line, Pair pair) {
    return each([&](int i) { return acc.lane[i] + line.even.lane[i] * pair.even + line.odd.lane[i] * pair.odd; });
  }

 private:
  static float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
