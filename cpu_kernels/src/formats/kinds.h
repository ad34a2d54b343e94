// The two kinds of product. A format says how its stored bytes become operands of one of them.
//
// Float kind: bf16 activations, fp32 sums. Integer kind: int8 activations, exact int32 sums of a group of inputs that
// are then scaled to fp32. In both a step takes four bytes of an activation row and one 64-byte operand.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

// Where blocks are read one after the other: with up to so many rows lines are asked for just before, with up to so
// many far ahead; more rows read blocks by turns. Measured: docs/kernels.md.
struct OrderedRows {
  int near, far;
};
constexpr int kAnyRows = 1 << 30;

struct FloatKind {
  using Line = Isa::Line;
  using Sum = F32;
  using Part = F32;  // what products are added to
  static constexpr int joined_steps = 0;
  static constexpr int panel_blocks = Isa::max_blocks;  // that rows pass over together
  static constexpr bool integer = false;
  static constexpr bool grouped = false;        // codes in groups: formats/grouped.h
  static constexpr bool wide = false;           // fp4 codes, multiplied by wide rows: formats/fp4.h
  static constexpr bool tiled = true;           // whether matrix tiles multiply it
  static constexpr bool opened_groups = false;  // codes in groups after they were opened
  static constexpr bool has_signs = true;       // no offset to be taken back
  static constexpr int step_inputs = 2;
  static constexpr int scale_lines = 1;   // stored lines for which one scale() is asked
  static constexpr int scaled_lines = 0;  // stored lines behind each line of scales; 0: all scales are in front
  static constexpr int abreast = Isa::max_blocks;  // blocks that few rows read by turns
  static constexpr bool streamed = false;          // whether all rows are as few: lines are never opened to a panel

  static HYBRID_INLINE Isa::Pair value(const char* row) { return Isa::load_pair(reinterpret_cast<const bf16*>(row)); }
  static HYBRID_INLINE Sum start(const char*, int, int) { return Isa::zero(); }
  static HYBRID_INLINE F32 widen(Sum sum) { return sum; }
  static HYBRID_INLINE F32 finish(F32 sum, const char*) { return sum; }
};

// Operands of the integer kind and what their products are added to, which Isa::Small is or not.
template <bool small>
struct IntegerOperands {
  using Line = Isa::Codes;
  using Part = Isa::Small;
};
template <>
struct IntegerOperands<false> {
  using Line = Isa::Bytes;
  using Part = Isa::I32;
};

// Weights are stored with an offset, because the instructions multiply unsigned by signed bytes. The sums of a group of
// inputs start at minus the offset times the sum of the activations, which lie behind the int8 values of a row; the
// scales of a row lie behind those. steps: those of codes whose products Isa::Small adds up, if it does.
template <int offset, int group, int steps>
struct IntegerKind {
  static constexpr bool small = steps > 0;
  using Line = typename IntegerOperands<small>::Line;
  using Sum = Isa::I32;
  using Part = typename IntegerOperands<small>::Part;
  static constexpr int joined_steps = steps;
  static constexpr int panel_blocks = small ? Isa::small_blocks : Isa::max_blocks;
  static constexpr bool integer = true;
  static constexpr bool grouped = false;
  static constexpr bool wide = false;
  static constexpr bool tiled = true;
  static constexpr bool opened_groups = false;
  static constexpr bool has_signs = false;  // whether opened operands are signed
  static constexpr int step_inputs = 4;
  static constexpr int scale_lines = 1;
  static constexpr int scaled_lines = 0;
  static constexpr int abreast = Isa::max_blocks;
  static constexpr bool streamed = false;

  static HYBRID_INLINE F32 widen(Sum sum) { return Isa::to_f32(sum); }
  static HYBRID_INLINE F32 finish(F32 sum, const char*) { return sum; }
  static HYBRID_INLINE auto value(const char* row) {
    if constexpr (small)
      return Isa::load_inputs(row);
    else
      return Isa::load_quad(row);
  }
  static HYBRID_INLINE Sum start(const char* row, int inputs, int first) {
    return Isa::set_int(start_sum(row, inputs, first));
  }
  static HYBRID_INLINE int start_sum(const char* row, int inputs, int first) {
    const int32_t* sums = reinterpret_cast<const int32_t*>(row + inputs) + first / kSumInputs;
    int sum = sums[0];
    for (int i = 1; i < min(group, inputs - first) / kSumInputs; ++i) {
      sum += sums[i];
      __asm__("" : "+r"(sum));  // so few are faster added one by one than as a vector
    }
    return -offset * sum;
  }
  static HYBRID_INLINE float row_scale(const char* row, int inputs, int first) {
    return reinterpret_cast<const float*>(row + inputs + inputs / kSumInputs * 4)[first / kScaleInputs];
  }
};

// Operands that were opened, whatever they stand for.
template <int joined>
struct OpenedBytes : IntegerKind<0, kSumInputs, joined> {
  static constexpr int line_inputs = 4;
  static constexpr int steps = 1;
  struct Scale {};

  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE auto operand(const char* line, int, Scale) {
    if constexpr (joined > 0)
      return Isa::load_codes(line);
    else
      return Isa::load_bytes(line);
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
