// mxfp4 (OCP microscaling): e2m1 codes of a pair of inputs a byte, a power of two per column and 32 inputs. Scaled
// codes are exact in bf16, so they become operands of the same chain of sums that bf16 has.
#pragma once

#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Mxfp4 : FloatKind {
  static constexpr int line_inputs = 8;
  static constexpr int steps = 4;
  static constexpr bool chained = true;
  static constexpr int segment = 16;  // lines whose scales fill one line of the header
  static constexpr bool opened = false;
  static constexpr int tile_rows = 3;
  using Scale = Isa::Fp4::Scale;
  static constexpr int scale_lines = 32 / line_inputs;  // that one scale of every column is for

  static constexpr int header(int inputs) { return (inputs / 2 + kLine - 1) / kLine * kLine; }
  static HYBRID_INLINE Scale scale(const char* header, int line) {
    return Isa::Fp4::scale(header + line / scale_lines * kBlock);
  }
  static HYBRID_INLINE Line operand(const char* line, int step, Scale scale) {
    return Isa::Fp4::open(line + step * kBlock, scale);
  }
  static HYBRID_INLINE void open(const char* line, int step, Scale scale, char* out) {
    Isa::store_line(out, operand(line, step, scale));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
