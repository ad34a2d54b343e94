// How few rows read weights: where lines that are read once are fetched to (the last argument of __builtin_prefetch),
// how many bytes of each block ahead, and whether blocks come one after the other or by turns.
#pragma once

#include "ops/operands.h"

namespace hybrid {
namespace HYBRID_ISA {

template <int to, int bytes, bool in_order>
struct Fetching {
  static constexpr int level = to, ahead = bytes;
  static constexpr bool ordered = in_order;
};

using Far = Fetching<2, 6144, false>;
using Near = Fetching<3, 2048, false>;
using OrderedFar = Fetching<2, 7168, true>;
// What is multiplied as fast as it comes is best left to the processor's own prefetching, and only begun for it.
using OrderedNear = Fetching<2, 256, true>;

// Calls function(Far{}) or whichever suits the processor and products of MR rows.
template <int near, int far, int MR, class Function>
static HYBRID_INLINE void with_reading(Function function) {
  if constexpr (MR <= near) {
    if (reading == Reading::ordered) return function(OrderedNear{});
  } else if constexpr (MR <= far) {
    if (reading == Reading::ordered) return function(OrderedFar{});
  }
  if (reading == Reading::near) return function(Near{});
  function(Far{});
}

// Codes that are opened in registers for more rows than this are read one block after the other, whatever suits the
// processor: beside their sums and parts there is no room for those of a second.
constexpr int kAbreastRows = 4;
constexpr int kAlone = 0;  // as many blocks by turns

// Calls function(ahead, Int<together>, j) for all of NB blocks, of which those from j on are read by turns, at most
// `abreast`.
template <int near, int far, int MR, int NB, int abreast, class Function>
static HYBRID_INLINE void for_streams(Function function) {
  if constexpr (abreast == kAlone) {
    for (int j = 0; j < NB; ++j) function(OrderedFar{}, Int<1>{}, j);
  } else {
    with_reading<near, far, MR>([&](auto ahead) __attribute__((always_inline)) {
      constexpr int together = decltype(ahead)::ordered ? 1 : NB < abreast ? NB : abreast;
      for (int j = 0; j < NB; j += together) function(ahead, Int<together>{}, j);
    });
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
