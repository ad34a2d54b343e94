// All weight formats, and the way from the name of one to its trait.
#pragma once

#include "formats/bf16.h"
#include "formats/fp4.h"
#include "formats/fp8.h"
#include "formats/grouped.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace hybrid {
namespace HYBRID_ISA {

// Calls function(Bf16{}) or whichever format it is.
template <class Function>
static constexpr HYBRID_INLINE void with_format(hybrid::Format format, Function function) {
  switch (format) {
    case hybrid::Format::bf16:
      return function(Bf16{});
    case hybrid::Format::int8:
      return function(Int8{});
    case hybrid::Format::int4:
      return function(Int4{});
    case hybrid::Format::fp8:
      return function(Fp8{});
    case hybrid::Format::fp8_row:
      return function(Fp8Row{});
    case hybrid::Format::mxfp4:
      return function(Mxfp4{});
    case hybrid::Format::nvfp4:
      return function(Nvfp4{});
    default:
      return function(Grouped{group_layout(format)});
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
