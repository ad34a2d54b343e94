// What the fields of ops on n-grams must be to each other.
#pragma once

#include "executor/executor.h"
#include "executor/require.h"

namespace hybrid {

inline void check_fit(const NgramArgs& a, const std::string& place) {
  require(a.size <= kMaxNgram, place + "size " + text(a.size) + " is above " + text(kMaxNgram));
  require_stride(place, "state.sequence_stride", a.state.sequence_stride, ngram_state_bytes(a.size));
}

inline void check_fit(const LookupArgs& a, const std::string& place) {
  require_stride(place, "output_stride", a.output_stride, int64_t(a.count) * a.dim);
}

inline void check_fit(const NgramGateArgs& a, const std::string& place) {
  require_stride(place, "projected_stride", a.projected_stride, (int64_t(a.count) + 1) * a.width);
  require_stride(place, "stream_stride", a.stream_stride, int64_t(a.count) * a.width);
}

inline void check_fit(const NgramConvArgs& a, const std::string& place) {
  require(a.taps <= kMaxTaps, place + "taps " + text(a.taps) + " is above " + text(kMaxTaps));
  require(a.width % a.count == 0, place + "a width of " + text(a.width) + " is not " + text(a.count) + " of one size");
  require_stride(place, "value_stride", a.value_stride, a.width / a.count);
  require_stride(place, "stream_stride", a.stream_stride, a.width);
  require_stride(place, "state.sequence_stride", a.state.sequence_stride,
                 conv_state_bytes(a.width, a.taps, a.dilation));
}

inline void check_extents_of(const LookupArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.count, place);
}

}  // namespace hybrid
