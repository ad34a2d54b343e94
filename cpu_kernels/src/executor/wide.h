// How formats of fp4 codes, and the rows that they are multiplied by, lie in memory: hybrid/formats/fp4.py and
// hybrid/formats/rows.py say the same in Python.
#pragma once

#include "executor/step.h"

namespace hybrid {

// A block may begin with a line of fp32 factors, one per column. Then come, by turns, a line of one-byte scales for
// four groups of inputs, [4 groups][16 columns], and the lines of their codes: of 16 columns by 8 inputs, the low
// halves of bytes the first four.
struct Fp4Layout {
  int group;  // inputs that share a scale
  bool factors;

  constexpr int part_inputs() const { return 4 * group; }  // whose scales fill a line
  constexpr int part_bytes() const { return kLine + part_inputs() * kBlock / 2; }
  constexpr int front_bytes() const { return factors ? kLine : 0; }
  constexpr int scales_bytes(int inputs) const { return (inputs + part_inputs() - 1) / part_inputs() * kLine; }
  constexpr int64_t block_bytes(int inputs) const {
    return front_bytes() + scales_bytes(inputs) + int64_t(inputs) * kBlock / 2;
  }
};

constexpr Fp4Layout kMxfp4{32, false}, kNvfp4{16, true};

constexpr bool is_wide(Format format) { return format == Format::mxfp4 || format == Format::nvfp4; }

// A wide row: its values as bf16, for matrix tiles; the same as whole numbers of kWideTop at most, in two bytes each,
// of which the upper ones come first; for each 32 inputs what sums start at; and a scale for each 256. The bounds are
// such that 32 products of a byte and a code do not overflow 16 bits.
constexpr int kWideHigh = 85, kWideLow = 64;
constexpr int kWideBase = 2 * kWideLow;
constexpr int kWideTop = kWideHigh * kWideBase + kWideLow - 1;
constexpr int kFp4Offset = 12;  // of twice the value of a code, so that bytes are unsigned

// The bytes that multiply wide rows, by code: twice its value, and the offset.
#define HYBRID_FP4_CODES 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0

// Minus the offset of codes times the sum of the first 16 inputs, and of all 32.
struct WideStart {
  int32_t first, both;
};

// Where the parts of a wide row of `inputs` padded inputs are, in bytes.
struct WideOffsets {
  int64_t high, low, starts, scales, end;

  constexpr explicit WideOffsets(int64_t inputs)
      : high(2 * inputs),
        low(3 * inputs),
        starts(4 * inputs),
        scales(starts + inputs / kSumInputs * int64_t(sizeof(WideStart))),
        end(scales + (inputs + kScaleInputs - 1) / kScaleInputs * 4) {}
};

}  // namespace hybrid
