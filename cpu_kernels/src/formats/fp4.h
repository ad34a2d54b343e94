// mxfp4 (OCP microscaling) and nvfp4: e2m1 codes, and a scale per column and 32 or 16 inputs, which is a power of two
// or e4m3; nvfp4 has an fp32 factor per column beside. Twice a code's value is a whole number, so wide rows multiply
// them as integers, exactly. On matrix tiles mxfp4 stays with bf16, in which its scaled codes are exact: segments of 32
// inputs would leave half of a tile of bytes empty, and need two of them.
#pragma once

#include "executor/wide.h"
#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Fp4Kind : FloatKind {
  static constexpr bool wide = true;
  static constexpr int line_inputs = 8;
  static constexpr int steps = 4;
  static constexpr bool chained = true;
  static constexpr int segment = 0;
  static constexpr bool opened = false;
  static constexpr int tile_rows = 7;
};

struct Mxfp4 : Fp4Kind {
  static constexpr OrderedRows ordered{0, kAnyRows};
  static constexpr Fp4Layout layout = kMxfp4;
  // Scales are opened this much smaller, and rows scaled by as much more: whole numbers of a group times a scale are
  // far above what they stand for, and are to stay finite. Weights of 2^-127 count as zero.
  static constexpr float smaller = 0x1p-23f;

  static HYBRID_INLINE F32 group_scale(const char* scales) {
    return Isa::mul(Isa::from_e8m0(scales), Isa::set(smaller));
  }
  static HYBRID_INLINE F32 finish_wide(F32 sum, const char*) { return sum; }
};

struct Nvfp4 : Fp4Kind {
  static constexpr bool tiled = false;
  static constexpr OrderedRows ordered{kAnyRows, kAnyRows};
  static constexpr Fp4Layout layout = kNvfp4;
  static constexpr float smaller = 0x1p-8f;  // from_fp8 gives 2^-8

  static HYBRID_INLINE F32 group_scale(const char* scales) { return Isa::from_fp8(scales); }
  static HYBRID_INLINE F32 finish_wide(F32 sum, const char* block) {
    return Isa::mul(sum, Isa::load(reinterpret_cast<const float*>(block)));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
