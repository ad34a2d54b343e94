// bf16: nothing but lines, one chain of sums over all inputs.
#pragma once

#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Bf16 : FloatKind {
  static constexpr int line_inputs = 2;  // inputs in a stored line
  static constexpr int steps = 1;        // operands in a stored line
  static constexpr bool chained = true;  // one chain of sums, whatever the segments
  static constexpr int segment = 0;      // stored lines that share scales; 0: all of them
  static constexpr bool opened = true;   // stored lines are operands as they are
  static constexpr OrderedRows ordered{2, 6};
  static constexpr int tile_rows = 7;  // from so many rows on matrix tiles, if there are any, are faster: measured
  struct Scale {};

  static constexpr int header(int) { return 0; }
  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE Line operand(const char* line, int, Scale) { return Isa::load_line(line); }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
