// int4: two nibbles a byte, low ones of the first four inputs of a line, high ones of the next four; a bf16 scale per
// column and 32 inputs. Before every eight lines is one of their scales, so that a core reads one stream.
#pragma once

#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Int4 : IntegerKind<8, kSumInputs, Isa::small_steps(4)> {
  static constexpr int line_inputs = 8;
  static constexpr int steps = 2;
  static constexpr bool chained = false;
  static constexpr int segment = 32 / line_inputs;
  static constexpr int scaled_lines = 2 * segment;
  static constexpr bool opened = false;
  static constexpr bool streamed = Isa::streams_codes;
  static constexpr OrderedRows ordered{2, 2};
  static constexpr int tile_rows = 17;
  struct Scale {};

  static constexpr int header(int inputs) { return inputs; }
  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE Line operand(const char* line, int step, Scale) { return Isa::load_nibbles(line, step); }
  static HYBRID_INLINE void open(const char* line, Scale, char* out) {
    for (int step = 0; step < steps; ++step) Isa::store_nibbles(out + step * kLine, line, step);
  }
  static HYBRID_INLINE F32 group_scale(const char* header, int line) {
    return Isa::from_bf16(header + line / scaled_lines * (scaled_lines + 1) * kLine + line / segment % 2 * kBlock * 2);
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
