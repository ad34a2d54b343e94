// What the fields of ops on streams and on entries must be to each other.
#pragma once

#include "executor/attention_checks.h"
#include "executor/executor.h"
#include "executor/require.h"

namespace hybrid {

inline void check_fit(const CollapseArgs& a, const std::string& place) {
  require(a.count <= kMaxStreams, place + "count " + text(a.count) + " is above " + text(kMaxStreams));
  require_stride(place, "stream_stride", a.stream_stride, int64_t(a.count) * a.width);
  require_stride(place, "output_stride", a.output_stride, a.width);
  if (a.gates) require_stride(place, "gate_stride", a.gate_stride, int64_t(a.count) * a.width);
}

inline void check_fit(const StreamGatesArgs& a, const std::string& place) {
  require(a.count <= kMaxStreams, place + "count " + text(a.count) + " is above " + text(kMaxStreams));
  require_stride(place, "low_stride", a.low_stride, int64_t(a.rank) + (a.weights ? a.count : 0));
  require_stride(place, "output_stride", a.output_stride, a.rank);
}

inline void check_fit(const ExpandArgs& a, const std::string& place) {
  require(a.count <= kMaxStreams, place + "count " + text(a.count) + " is above " + text(kMaxStreams));
  require_stride(place, "stream_stride", a.stream_stride, int64_t(a.count) * a.width);
  require_stride(place, "input_stride", a.input_stride, a.width);
}

// Of a head whose last dimensions turn.
inline void check_turning(int dim, int rope_dim, const std::string& place) {
  require(dim <= kMaxHeadDim, place + "a head of " + text(dim) + " dimensions is above " + text(kMaxHeadDim));
  require(rope_dim <= dim && rope_dim % 2 == 0,
          place + "rope_dim is " + text(rope_dim) + "; it must be even and at most the " + text(dim) + " of a head");
}

inline void check_padded(int dim, int padded_dim, const std::string& place) {
  require_stride(place, "padded_dim", padded_dim, dim);
  require(padded_dim <= kMaxHeadDim, place + "padded_dim " + text(padded_dim) + " is above " + text(kMaxHeadDim));
}

inline void check_fit(const TurnArgs& a, const std::string& place) {
  check_turning(a.head_dim, a.rope_dim, place);
  check_padded(a.head_dim, a.padded_dim, place);
  require_stride(place, "query_stride", a.query_stride, int64_t(a.heads) * a.head_dim);
  if (!a.keys) return;
  require_stride(place, "key_stride", a.key_stride, a.head_dim);
  check_padded(a.head_dim, a.kv.key_dim, place);
  check_entry(a.kv, place);
}

inline void check_fit(const UnturnArgs& a, const std::string& place) {
  check_turning(a.head_dim, a.rope_dim, place);
  require_stride(place, "stride", a.stride, int64_t(a.heads) * a.head_dim);
}

inline void check_fit(const CompressArgs& a, const std::string& place) {
  check_turning(a.dim, a.rope_dim, place);
  const int padded = a.indexes ? a.kv.index_dim : a.kv.key_dim;
  check_padded(a.dim, padded, place);
  const int64_t sets = a.overlaps ? 2 : 1;
  require(sets * a.rate <= kMaxCompressed,
          place + "an entry of " + text(sets * a.rate) + " tokens; at most " + text(kMaxCompressed) + " are supported");
  require_stride(place, "width", a.width, a.first_value + sets * a.dim);
  if (a.bias) require_stride(place, "width", a.width, a.first_gate + sets * a.dim);
  if (!a.indexes) check_entry(a.kv, place);
  require(a.tokens >= sets * a.rate,
          place + "tokens is " + text(a.tokens) + "; an entry is made of " + text(sets * a.rate));
  require_stride(place, "kv.sequence_stride", a.kv.sequence_stride, a.kv.tail_offset + int64_t(a.tokens) * a.width * 4);
}

inline void check_fit(const KeepArgs& a, const std::string& place) {
  const int64_t end = a.width ? a.kv.tail_offset + int64_t(a.tokens) * a.width * 4 : a.tokens * a.kv.entry_bytes;
  require_stride(place, "kv.sequence_stride", a.kv.sequence_stride, end);
}

inline void check_fit(const EntryScoresArgs& a, const std::string& place) {
  require(a.heads <= kMaxTileRows, place + "heads " + text(a.heads) + " is above " + text(kMaxTileRows));
  require(a.kv.index_dim >= 1 && a.kv.index_dim <= kMaxHeadDim,
          place + "kv.index_dim is " + text(a.kv.index_dim) + "; it must be from 1 to " + text(kMaxHeadDim));
}

// Attention counts on it that no row sees more than its key blocks would hold.
inline void check_fit(const SeeArgs& a, const std::string& place) {
  require(a.window <= kKeys / 2, place + "window " + text(a.window) + " is above " + text(kKeys / 2));
  require(a.rate != 1, place + "rate is 1; an entry stands for several tokens");
  require_stride(place, "stride", a.stride, int64_t(a.window) + a.selects);
}

inline void check_presence(const CollapseArgs& a, const std::string& place) {
  require(!a.products == !a.base && !a.products == !a.scale,
          place + "of products, base and scale one is null, and another is not");
  require(a.products || !a.weights, place + "products is null, and weights are not");
  require(!a.gates == !a.norm, place + "of norm and gates one is null, and the other is not");
}

inline void check_presence(const CompressArgs& a, const std::string& place) {
  require(a.rope || !a.rope_dim, place + "rope is null, and rope_dim is " + text(a.rope_dim));
}

inline void check_presence(const TurnArgs& a, const std::string& place) {
  require(a.rope || !a.rope_dim, place + "rope is null, and rope_dim is " + text(a.rope_dim));
  require(!a.query_norm || !a.normed, place + "query_norm is not null, and queries are normed without a weight");
  require(!a.norm == !a.keys && !a.made == !a.keys, place + "keys, norm and made are all there or none is");
}

inline void check_fit(const SelectPoolsArgs& a, const std::string& place) {
  require(a.rate != 1, place + "rate is 1; a pool is of several tokens");
  require_stride(place, "stride", a.stride, int64_t(a.selects + 1) * a.rate - 1);
}

inline void check_presence(const SeeArgs& a, const std::string& place) {
  require(!a.scores == !a.q && !a.scores == !a.selects, place + "scores, q and selects are all there or none is");
}

inline void check_extents_of(const TurnArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * (a.heads + 1), place);
}

inline void check_extents_of(const UnturnArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.heads, place);
}

inline void check_extents_of(const ExpandArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * (a.width / kBlock + 1), place);
}

inline void check_extents_of(const CompressArgs& a, const Limits& limits, const std::string& place) {
  const int64_t start = a.indexes ? a.kv.index_offset : a.kv.entry_offset;
  const int64_t size = a.indexes ? int64_t(a.kv.index_dim) * 2 : a.kv.entry_bytes;
  require_stride(place, "kv.sequence_stride", a.kv.sequence_stride, start + limits.positions / a.rate * size);
}

inline void check_extents_of(const EntryScoresArgs& a, const Limits& limits, const std::string& place) {
  require_stride(place, "kv.sequence_stride", a.kv.sequence_stride,
                 a.kv.index_offset + int64_t(limits.positions / a.rate) * a.kv.index_dim * 2);
  require_countable(int64_t(limits.rows) * (limits.positions / kKeys + 1), place);
}

inline void check_extents_of(const SeeArgs& a, const Limits& limits, const std::string& place) {
  if (a.rate && !a.selects) require_stride(place, "stride", a.stride, int64_t(a.window) + limits.positions / a.rate);
}

}  // namespace hybrid
