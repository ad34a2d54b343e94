// fp8 (e4m3): four rows of 16 bytes a line. Scales are fp32: one per block of 128 inputs, the same for its 16 columns;
// or one per column (fp8_row).
#pragma once

#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

template <int segment_inputs>
struct Fp8Kind : FloatKind {
  static constexpr int line_inputs = 4;
  static constexpr int steps = 2;
  static constexpr bool chained = false;
  static constexpr int segment = segment_inputs / line_inputs;
  static constexpr bool opened = false;
  static constexpr int abreast = 2;  // sums of more leave no registers for what opens lines
  static constexpr OrderedRows ordered{0, 0};
  static constexpr int tile_rows = 3;
  static constexpr float larger = 256.0f;  // from_fp8 gives 2^-8
  struct Scale {};

  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE Line operand(const char* line, int step, Scale) { return Isa::load_fp8(line, step); }
  static HYBRID_INLINE void open(const char* line, Scale scale, char* out) {
    const Line first = operand(line, 0, scale), second = operand(line, 1, scale);
    Isa::store_line(out, first);
    Isa::store_line(out + kLine, second);
  }
};

struct Fp8 : Fp8Kind<128> {
  static constexpr int header(int inputs) { return ((inputs + 127) / 128 * 4 + kLine - 1) / kLine * kLine; }
  static HYBRID_INLINE F32 group_scale(const char* header, int line) {
    return Isa::set(reinterpret_cast<const float*>(header)[line / segment] * larger);
  }
};

struct Fp8Row : Fp8Kind<kPanelInputs> {
  static constexpr int header(int) { return kBlock * 4; }
  static HYBRID_INLINE F32 group_scale(const char*, int) { return Isa::set(larger); }
  static HYBRID_INLINE F32 finish(F32 sum, const char* header) {
    return Isa::mul(sum, Isa::load(reinterpret_cast<const float*>(header)));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
