// fp8 (e4m3): four rows of 16 bytes a line; an fp32 scale per block of 128 inputs, the same for its 16 columns.
#pragma once

#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Fp8 : FloatKind {
  static constexpr int line_inputs = 4;
  static constexpr int steps = 2;
  static constexpr bool chained = false;
  static constexpr int segment = 128 / line_inputs;
  static constexpr bool opened = false;
  static constexpr int tile_rows = 3;
  struct Scale {};

  static constexpr int header(int inputs) { return ((inputs + 127) / 128 * 4 + kLine - 1) / kLine * kLine; }
  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE Line operand(const char* line, int step, Scale) {
    const char* pair = line + step * 2 * kBlock;
    return Isa::make_line(Isa::from_fp8(pair), Isa::from_fp8(pair + kBlock));
  }
  static HYBRID_INLINE void open(const char* line, int step, Scale scale, char* out) {
    Isa::store_line(out, operand(line, step, scale));
  }
  static HYBRID_INLINE F32 group_scale(const char* header, int line) {
    return Isa::set(reinterpret_cast<const float*>(header)[line / segment] * 256.0f);  // from_fp8 gives 2^-8
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
