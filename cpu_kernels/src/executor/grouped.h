// How formats of codes in groups, and the rows that they are multiplied by, lie in memory: hybrid/formats/grouped.py
// and hybrid/formats/rows.py say the same in Python.
#pragma once

#include "executor/step.h"

namespace hybrid {

// A scale in fp16 for each group; a minimum in fp16 beside it; factors in fp16 for 256 inputs, and a scale and a
// minimum of 6 bits for each group; a factor for 256 inputs, and a signed scale for each group of 16.
enum class GroupScales { halves, minima, superblocks, small_groups };

struct GroupLayout {
  int bits;
  int offset;  // that is taken off a code
  GroupScales scales;

  constexpr int group() const { return scales == GroupScales::small_groups ? 16 : 32; }
  constexpr int head_bytes() const { return scales == GroupScales::minima ? 2 * kLine : kLine; }  // before the codes
  constexpr int part_bytes() const { return head_bytes() + kInputs * kBlock * bits / 8; }         // of 64 inputs
  constexpr int header_bytes(int inputs) const {
    const bool factors = scales == GroupScales::superblocks || scales == GroupScales::small_groups;
    return factors ? (inputs + kScaleInputs - 1) / kScaleInputs * kLine : 0;
  }
  constexpr int64_t block_bytes(int inputs) const {
    return header_bytes(inputs) + int64_t(inputs) / kInputs * part_bytes();
  }
};

// Of 32 inputs of a grouped row, behind its int8 values: their scale, and the sum of what they stand for.
struct RowGroup {
  float scale, sum;
};

static constexpr bool is_grouped(Format format) { return format >= Format::q8_0; }

static constexpr GroupLayout group_layout(Format format) {
  switch (format) {
    case Format::q8_0:
      return {8, 128, GroupScales::halves};
    case Format::q4_0:
      return {4, 8, GroupScales::halves};
    case Format::q5_0:
      return {5, 16, GroupScales::halves};
    case Format::q4_1:
      return {4, 0, GroupScales::minima};
    case Format::q5_1:
      return {5, 0, GroupScales::minima};
    case Format::q4_k:
      return {4, 0, GroupScales::superblocks};
    case Format::q5_k:
      return {5, 0, GroupScales::superblocks};
    default:
      return {6, 32, GroupScales::small_groups};
  }
}

}  // namespace hybrid
