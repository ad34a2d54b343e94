// int8: a scale per column; sums of 256 inputs, those that share a scale of the activations.
#pragma once

#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Int8 : IntegerKind<128, kScaleInputs, Isa::small_steps(8)> {
  static constexpr int line_inputs = 4;
  static constexpr int steps = 1;
  static constexpr bool chained = false;
  static constexpr int segment = kScaleInputs / line_inputs;
  static constexpr bool opened = true;
  static constexpr OrderedRows ordered{4, 6};
  static constexpr int tile_rows = 17;
  struct Scale {};

  static constexpr int header(int) { return kBlock * 4; }
  static HYBRID_INLINE Scale scale(const char*, int) { return {}; }
  static HYBRID_INLINE Line operand(const char* line, int, Scale) { return Isa::load_bytes(line); }
  static HYBRID_INLINE F32 group_scale(const char*, int) { return Isa::set(1.0f); }
  static HYBRID_INLINE F32 finish(F32 sum, const char* header) {
    return Isa::mul(sum, Isa::load(reinterpret_cast<const float*>(header)));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
