// How formats of codes in groups, and the rows that they are multiplied by, lie in memory: hybrid/formats/grouped.py
// and hybrid/formats/rows.py say the same in Python.
#pragma once

#include "executor/step.h"

namespace hybrid {

// A scale in fp16 for each group; a minimum in fp16 beside it; factors in fp16 for 256 inputs, and a scale and a
// minimum of 6 bits for each group; a factor for 256 inputs, and a signed scale for each group of 16; the same with a
// factor in fp32, and a table in front of the block; factors as of superblocks, and of each group of 16 a byte of a
// scale and a minimum.
enum class GroupScales { halves, minima, superblocks, small_groups, tabled, small_superblocks };

constexpr int kTable = 0;  // in place of their bits: codes of 4 bits that the 16 bytes of a block's table stand for

// Inputs that share a scale. codes: their bits, or kTable.
constexpr int group_inputs(int codes) { return codes == 2 || codes == 6 || codes == kTable ? 16 : 32; }

struct GroupLayout {
  int bits;
  int offset;  // that is taken off a code, or off what it stands for
  GroupScales scales;

  constexpr int codes() const { return scales == GroupScales::tabled ? kTable : bits; }
  constexpr int group() const { return group_inputs(codes()); }
  // Before the codes of 64 inputs, before 256 inputs, and in front of a block.
  constexpr int head_bytes() const { return scales == GroupScales::minima ? 2 * kLine : kLine; }
  constexpr int factor_bytes() const {
    return scales == GroupScales::halves || scales == GroupScales::minima ? 0 : kLine;
  }
  constexpr int table_bytes() const { return scales == GroupScales::tabled ? kLine : 0; }
  constexpr int part_bytes() const { return head_bytes() + kInputs * kBlock * bits / 8; }              // of 64 inputs
  constexpr int span_bytes() const { return factor_bytes() + kScaleInputs / kInputs * part_bytes(); }  // of 256
  constexpr int64_t block_bytes(int inputs) const {
    const int factors = (inputs + kScaleInputs - 1) / kScaleInputs * factor_bytes();
    return table_bytes() + factors + int64_t(inputs) / kInputs * part_bytes();
  }
};

// Of 32 inputs of a grouped row, behind its int8 values: their scale, and the sum of what they, and each 16 of them,
// stand for.
struct RowGroup {
  float scale, sum, halves[2];
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
    case Format::q4_t:
      return {4, 128, GroupScales::tabled};
    case Format::q2_k:
      return {2, 0, GroupScales::small_superblocks};
    default:
      return {6, 32, GroupScales::small_groups};
  }
}

}  // namespace hybrid
