// What the ops must be that keep a state for each sequence.
#pragma once

#include <utility>

#include "executor/executor.h"
#include "executor/require.h"
#include "executor/sizes.h"

namespace hybrid {

inline void check_fit(const ShortConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
  require_stride(place, "input_stride", a.input_stride, 3 * int64_t(a.width));
  require_stride(place, "output_stride", a.output_stride, a.width);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, (a.taps - 1) * int64_t(a.width) * 4);
}

inline void check_fit(const SiluConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
  require_stride(place, "stride", a.stride, a.width);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, (a.taps - 1) * int64_t(a.width) * 4);
}

inline void check_fit(const GatedDeltaArgs& a, const std::string& place) {
  require(a.value_heads % a.key_heads == 0,
          place + text(a.value_heads) + " value heads cannot share " + text(a.key_heads) + " key heads evenly");
  for (const auto& [name, dim] : {std::pair{"key_dim ", a.key_dim}, std::pair{"value_dim ", a.value_dim}})
    require(dim <= kMaxDeltaDim, place + name + text(dim) + " is above " + text(kMaxDeltaDim));
  const int64_t keys = int64_t(a.key_heads) * a.key_dim, values = int64_t(a.value_heads) * a.value_dim;
  require_stride(place, "input_stride", a.input_stride, 2 * (keys + values));
  require_stride(place, "decay_stride", a.decay_stride, 2 * int64_t(a.value_heads));
  require_stride(place, "output_stride", a.output_stride, values);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride,
                 delta_state_bytes(a.value_heads, a.key_dim, a.value_dim));
}

}  // namespace hybrid
