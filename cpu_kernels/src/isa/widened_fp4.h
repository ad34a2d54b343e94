// A line of mxfp4 opened by way of fp32, where an instruction set has nothing shorter.
#pragma once

#include "executor/args.h"

namespace hybrid {
namespace HYBRID_ISA {

template <class Isa>
struct WidenedFp4 {
  using Scale = typename Isa::F32;

  // Of 16 columns, from their powers of two.
  static Scale scale(const char* exponents) {
    return Isa::mul(Isa::from_e8m0(exponents), Isa::set(0.5f));  // from_fp4 gives twice the value
  }
  // A pair of inputs of 16 columns.
  static typename Isa::Line open(const char* codes, Scale scale) {
    typename Isa::F32 even, odd;
    Isa::from_fp4(codes, even, odd);
    return Isa::make_line(Isa::mul(even, scale), Isa::mul(odd, scale));
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
