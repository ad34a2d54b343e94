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
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, conv_state_bytes(a.width, a.taps));
}

inline void check_fit(const SiluConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
  require_stride(place, "stride", a.stride, a.width);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, conv_state_bytes(a.width, a.taps));
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
                 delta_state_bytes(a.value_heads, a.key_dim, a.value_dim, false));
}

inline void check_fit(const KimiDeltaArgs& a, const std::string& place) {
  for (const auto& [name, dim] : {std::pair{"key_dim ", a.key_dim}, std::pair{"value_dim ", a.value_dim}})
    require(dim <= kMaxDeltaDim, place + name + text(dim) + " is above " + text(kMaxDeltaDim));
  require(a.lower_bound <= 0, place + "lower_bound is " + std::to_string(a.lower_bound) + "; it must be at most 0");
  const int64_t keys = int64_t(a.heads) * a.key_dim, values = int64_t(a.heads) * a.value_dim;
  require_stride(place, "input_stride", a.input_stride, 2 * keys + values);
  require_stride(place, "decay_stride", a.decay_stride, keys);
  require_stride(place, "beta_stride", a.beta_stride, a.heads);
  require_stride(place, "gate_stride", a.gate_stride, values);
  require_stride(place, "output_stride", a.output_stride, values);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride,
                 delta_state_bytes(a.heads, a.key_dim, a.value_dim, true));
}

inline void check_fit(const StateSpaceArgs& a, const std::string& place) {
  require(a.heads % a.groups == 0, place + text(a.heads) + " heads cannot share " + text(a.groups) + " groups evenly");
  for (const auto& [name, dim] : {std::pair{"head_dim ", a.head_dim}, std::pair{"state_dim ", a.state_dim}})
    require(dim <= kMaxDeltaDim, place + name + text(dim) + " is above " + text(kMaxDeltaDim));
  const int64_t inner = int64_t(a.heads) * a.head_dim, shared = int64_t(a.groups) * a.state_dim;
  require_stride(place, "stride", a.stride, 2 * (inner + shared));
  require_stride(place, "step_stride", a.step_stride, a.heads);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride,
                 delta_state_bytes(a.heads, a.state_dim, a.head_dim, false));
}

inline void check_fit(const GroupNormArgs& a, const std::string& place) {
  require(a.width % a.groups == 0,
          place + "a width of " + text(a.width) + " is not " + text(a.groups) + " groups of one size");
  require_stride(place, "input_stride", a.input_stride, a.width);
  require_stride(place, "output_stride", a.output_stride, a.width);
}

}  // namespace hybrid
