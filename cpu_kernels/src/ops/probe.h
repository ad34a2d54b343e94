// The machine's limits, measured with the instructions that the kernels use.
#pragma once

#include "formats/bf16.h"
#include "formats/int8.h"
#include "ops/tile_use.h"

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

// Dot products of one kind, as a tile of rows by two blocks makes them out of the first-level cache; returns the
// operations done.
template <class Format>
static double multiply(int64_t rounds) {
  if constexpr (Isa::has_tiles) return multiply_in_tiles<Format>(rounds);
  constexpr int kRows = 6, kBlocks = Isa::max_rows * Isa::max_blocks > 12 ? 2 : 1;
  alignas(64) char lines[kBlocks][kLine] = {}, rows[kRows][kLine] = {};
  typename Format::Sum acc[kRows][kBlocks];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) acc[r][j] = Format::start(rows[r], 0, 0);
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("" : : "r"(lines), "r"(rows) : "memory");  // nobody may know that these are the same every time
    typename Format::Line operand[kBlocks];
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) operand[j] = Format::operand(lines[j], 0, {});
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) acc[r][j] = Isa::dot(acc[r][j], operand[j], Format::value(rows[r]));
  }
  F32 total = Isa::zero();
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) total = Isa::add(total, Format::widen(acc[r][j]));
  constexpr double kOperations = 2.0 * Format::step_inputs * kBlock * kRows * kBlocks;
  return double(rounds) * kOperations + double(Isa::sum(total));
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
