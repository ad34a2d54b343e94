// The machine's limits, measured with the instructions that the kernels use.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

static float read(const char* data, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  F32 sum[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
  for (int64_t i = 0; i + 4 * kLine <= bytes; i += 4 * kLine) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(data + i + j * kLine + kAhead, 0, 3);
      sum[j] = Isa::add(sum[j], Isa::load(reinterpret_cast<const float*>(data + i) + j * kBlock));
    }
  }
  return Isa::sum(Isa::add(Isa::add(sum[0], sum[1]), Isa::add(sum[2], sum[3])));
}

static double multiply(int64_t rounds) {
  constexpr int kChains = Isa::max_rows * Isa::max_blocks > 12 ? 12 : 4;  // hides the latency of every chain
  alignas(64) char line_bytes[kLine] = {};
  bf16 pair_bits[2] = {0x3f80, 0x3f80};
  const Isa::Line line = Isa::load_line(line_bytes);
  Isa::Pair pair = Isa::load_pair(pair_bits);
  F32 acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = Isa::zero();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = Isa::dot(acc[c], line, pair);
  }
  float total = 0.0f;
  for (int c = 0; c < kChains; ++c) total += Isa::sum(acc[c]);
  constexpr double kOperations = 2.0 * 2 * kBlock;
  return double(rounds) * kChains * kOperations + double(total);
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
