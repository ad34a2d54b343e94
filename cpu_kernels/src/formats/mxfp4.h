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
  using Scale = F32;

  static constexpr int header(int inputs) { return (inputs / 2 + kLine - 1) / kLine * kLine; }
  static HYBRID_INLINE Scale scale(const char* header, int line) {
    return Isa::mul(Isa::from_e8m0(header + line / 4 * kBlock), Isa::set(0.5f));  // from_fp4 gives twice the value
  }
  static HYBRID_INLINE Line operand(const char* line, int step, Scale scale) {
    F32 even, odd;
    Isa::from_fp4(line + step * kBlock, even, odd);
    return Isa::make_line(Isa::mul(even, scale), Isa::mul(odd, scale));
  }
  static HYBRID_INLINE void open(const char* line, int step, Scale scale, char* out) {
    Isa::store_line(out, operand(line, step, scale));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
