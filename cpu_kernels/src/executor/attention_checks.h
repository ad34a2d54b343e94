// What the ops of attention must be: keys and values, queries, indexers.
#pragma once

#include <algorithm>

#include "executor/executor.h"
#include "executor/require.h"
#include "executor/sizes.h"

namespace hybrid {

inline void check_fit(const RopeTableArgs& a, const std::string& place) {
  require(a.dim % 2 == 0, place + "dim is " + text(a.dim) + "; it must be even");
}

// head_dim: of a key. value_dim: of a value.
inline void check_layout(const KvLayout& kv, int head_dim, int value_dim, const std::string& place) {
  require(kv.format == Format::bf16 || kv.format == Format::int8 || kv.format == Format::fp8,
          place + "keys and values are stored as bf16, int8 or fp8");
  require(head_dim <= kMaxHeadDim, place + "head_dim " + text(head_dim) + " is above " + text(kMaxHeadDim));
  require(kv.key_dim <= kMaxHeadDim, place + "kv.key_dim " + text(kv.key_dim) + " is above " + text(kMaxHeadDim));
  require(head_dim <= kv.key_dim, place + "head_dim " + text(head_dim) + " is above kv.key_dim " + text(kv.key_dim));
  require(value_dim <= kMaxHeadDim,
          place + "the width of a value " + text(value_dim) + " is above " + text(kMaxHeadDim));
  require(value_dim <= kv.value_dim,
          place + "the width of a value " + text(value_dim) + " is above kv.value_dim " + text(kv.value_dim));
  if (!kv.shared) return;
  require(kv.value_dim <= kv.key_dim, place + "kv.value_dim " + text(kv.value_dim) + " is above kv.key_dim " +
                                          text(kv.key_dim) + ", which it shares");
  require(kv.head_stride == 0, place + "kv.head_stride is " + text(kv.head_stride) + "; heads share their keys");
  require(kv.value_scales == kv.key_scales,
          place + "kv.value_scales_offset is " + text(kv.value_scales) + "; values share the scales of keys");
}

// Of queries, as both ops that make them have it.
template <class Args>
void check_growth(const Args& a, const std::string& place) {
  require(a.growth == 0 || a.growth_length > 0,
          place + "growth_length is " + text(a.growth_length) + "; queries that grow need one above 0");
}

inline void check_fit(const QkvArgs& a, const std::string& place) {
  check_growth(a, place);
  check_layout(a.kv, a.head_dim, a.value_width(), place);
  require(a.rope_dim <= a.head_dim && a.rope_dim % 2 == 0,
          place + "rope_dim is " + text(a.rope_dim) + "; it must be even and at most head_dim " + text(a.head_dim));
  require(a.value_width() == a.head_dim || !a.keys_are_values,
          place + "value_head_dim is " + text(a.value_head_dim) + "; keys are values, of head_dim " + text(a.head_dim));
  const int64_t values = a.keys_are_values ? 0 : int64_t(a.kv_heads) * a.value_width();
  require_stride(place, "qkv_stride", a.qkv_stride,
                 (a.heads * (a.gated ? 2 : 1) + int64_t(a.kv_heads)) * a.head_dim + values);
}

inline void check_fit(const GateArgs& a, const std::string& place) {
  require_stride(place, "stride", a.stride, int64_t(a.heads) * a.head_dim);
  const int own = a.per_head ? 1 : a.head_dim;
  require_stride(place, "gate_head_stride", a.gate_head_stride, own);
  require_stride(place, "gate_stride", a.gate_stride, (a.heads - 1) * int64_t(a.gate_head_stride) + own);
}

inline void check_fit(const LatentArgs& a, const std::string& place) {
  check_growth(a, place);
  require(a.kv.shared, place + "kv.shared is false; latents are keys and values of all heads");
  require(a.rope_dim % 2 == 0, place + "rope_dim is " + text(a.rope_dim) + "; it must be even");
  check_layout(a.kv, a.rank, a.rank, place);
  const int behind = room_behind(a.rope_dim);
  require(int64_t(a.rank) + behind <= a.kv.key_dim, place + "rank " + text(a.rank) + " and the " + text(behind) +
                                                        " dimensions behind it are above kv.key_dim " +
                                                        text(a.kv.key_dim));
  const int64_t dim = int64_t(a.nope_dim) + a.rope_dim;
  require_stride(place, "query_stride", a.query_stride, a.heads * dim);
  require_stride(place, "latent_stride", a.latent_stride, int64_t(a.rank) + a.rope_dim);
  require_stride(place, "plain_stride", a.plain_stride, a.nope_dim);
}

inline void check_blocks(const AttentionArgs& a, const std::string& place) {
  require(!a.block_count || !(a.kv.shared || a.window || a.ends),
          place + "block_count is " + text(a.block_count) +
              "; blocks are selected of keys that are not shared, without a window or ends");
}

// An entry, or the key of a token that lies as one.
inline void check_entry(const KvLayout& kv, const std::string& place) {
  require_stride(place, "kv.entry_bytes", kv.entry_bytes,
                 kv.format == Format::bf16 ? int64_t(kv.key_dim) * 2 : int64_t(kv.key_dim) + 4);
}

// Of keys that lie as entries, behind which these begin.
inline void check_kept(const AttentionArgs& a, const std::string& place) {
  require(!a.fresh || (a.kept && a.counts), place + "fresh is not null, and kept is 0 or counts are null");
  if (!a.fresh) return;
  require(a.score_cap == 0, place + "score_cap is not 0 beside fresh: scores of kept tokens have no bounds");
  check_entry(a.kv, place);
  const int64_t keys = a.kept * a.kv.entry_bytes;
  require_stride(place, "kv.sequence_stride", a.kv.sequence_stride, keys);
  if (a.kv.entry_offset) require_stride(place, "kv.entry_offset", a.kv.entry_offset, keys);
}

inline void check_fit(const AttentionArgs& a, const std::string& place) {
  check_layout(a.kv, 1, a.head_dim, place);
  require(a.score_cap >= 0, place + "score_cap is below 0; it must be above, or 0 for no bounds");
  const int group = a.heads / a.kv_heads;
  require(a.heads % a.kv_heads == 0,
          place + text(a.heads) + " heads cannot share " + text(a.kv_heads) + " KV heads evenly");
  require(group <= kMaxTileRows,
          place + text(group) + " query heads per KV head; at most " + text(kMaxTileRows) + " are supported");
  if (a.output_head_stride) require_stride(place, "output_head_stride", a.output_head_stride, a.head_dim);
  const int64_t apart = a.output_head_stride ? a.output_head_stride : a.head_dim;
  if (a.output) require_stride(place, "output_stride", a.output_stride, (a.heads - 1) * apart + a.head_dim);
  require(!a.selects || !(a.window || a.ends || a.blocks),
          place + "selects is " + text(a.selects) + "; keys are selected without a window, ends or blocks");
  check_blocks(a, place);
  check_kept(a, place);
}

inline void check_index_keys(const KvLayout& kv, int head_dim, const std::string& place) {
  const std::string size = "kv.index_dim " + text(kv.index_dim);
  require(kv.index_dim <= kMaxHeadDim, place + size + " is above " + text(kMaxHeadDim));
  require(head_dim <= kv.index_dim, place + "head_dim " + text(head_dim) + " is above " + size);
}

inline void check_fit(const IndexArgs& a, const std::string& place) {
  check_index_keys(a.kv, a.head_dim, place);
  require(a.head_dim % 2 == 0, place + "head_dim is " + text(a.head_dim) + "; it must be even");
  require(a.rope_dim <= a.head_dim && a.rope_dim % 2 == 0,
          place + "rope_dim is " + text(a.rope_dim) + "; it must be even and at most head_dim " + text(a.head_dim));
  require_stride(place, "query_stride", a.query_stride, int64_t(a.heads) * a.head_dim);
  require_stride(place, "key_stride", a.key_stride, a.head_dim);
}

inline void check_fit(const IndexScoresArgs& a, const std::string& place) {
  check_index_keys(a.kv, 1, place);
  require(a.heads <= kMaxTileRows, place + "heads " + text(a.heads) + " is above " + text(kMaxTileRows));
}

inline void check_fit(const BlockScoresArgs& a, const std::string& place) {
  check_index_keys(a.kv, 1, place);
  require(a.heads <= kMaxTileRows, place + "heads " + text(a.heads) + " is above " + text(kMaxTileRows));
}

inline void check_presence(const RopeTableArgs& a, const std::string& place) {
  require(a.lengths || !a.long_frequencies, place + "lengths is null, and there are long_frequencies");
}

inline void check_presence(const QkvArgs& a, const std::string& place) {
  require(a.rope || !a.rope_dim, place + "rope is null, and rope_dim is " + text(a.rope_dim));
  require(a.q || !a.heads, place + "q is null, and there are " + text(a.heads) + " heads");
  require(!a.gated || !a.norm_whole, place + "gated and norm_whole exclude each other");
  require(!a.norm_apart || !(a.norm_whole || a.norm_last), place + "norm_apart excludes norm_whole and norm_last");
}

inline void check_presence(const LatentArgs& a, const std::string& place) {
  require(a.norm || !a.rope, place + "norm is null, and rope is not");
  require(!a.heads || (a.norm && a.queries && a.plain && a.q),
          place + "queries, plain, q or norm is null, and there are " + text(a.heads) + " heads");
}

inline void check_presence(const AttentionArgs& a, const std::string& place) {
  require(a.output || a.partials, place + "output and partials are null");
  require(!a.selected == !a.selects,
          place + "selected is " + (a.selected ? "not " : "") + "null, and selects is " + text(a.selects));
  require(a.selected || !a.counts, place + "selected is null, and counts are not");
  require(!a.blocks == !a.block_count,
          place + "blocks is " + (a.blocks ? "not " : "") + "null, and block_count is " + text(a.block_count));
}

// Rows of keys and values, and where they have scales, lie behind each other in a head, heads in a sequence.
inline void check_arena(const KvLayout& kv, int kv_heads, const Limits& limits, const std::string& place) {
  const int64_t tokens = up(limits.positions, kBlock), size = kv.format == Format::bf16 ? 2 : 1;
  if (kv.shared) {
    const int64_t keys = tokens * kv.key_dim * size;
    if (size == 1) require_stride(place, "kv.key_scales_offset", kv.key_scales, keys);
    return require_stride(place, "kv.sequence_stride", kv.sequence_stride,
                          size == 1 ? kv.key_scales + tokens * 4 : keys);
  }
  require_stride(place, "kv.value_offset", kv.value_offset, tokens * kv.key_dim * size);
  int64_t end = kv.value_offset + tokens * kv.value_dim * size;
  if (kv.format != Format::bf16) {
    require_stride(place, "kv.key_scales_offset", kv.key_scales, end);
    require_stride(place, "kv.value_scales_offset", kv.value_scales, kv.key_scales + tokens * 4);
    end = kv.value_scales + tokens * 4;
  }
  require_stride(place, "kv.head_stride", kv.head_stride, end);
  require_stride(place, "kv.sequence_stride", kv.sequence_stride / kv_heads, kv.head_stride);
}

inline void check_index_arena(const KvLayout& kv, const Limits& limits, const std::string& place) {
  check_arena(kv, 1, limits, place);
  require_stride(place, "kv.sequence_stride", kv.sequence_stride,
                 kv.index_offset + up(limits.positions, kBlock) * kv.index_dim * 2);
}

inline void check_extents_of(const IndexArgs& a, const Limits& limits, const std::string& place) {
  check_index_arena(a.kv, limits, place);
  require_countable(int64_t(limits.rows) * (a.heads + 1), place);
}

inline void check_extents_of(const IndexScoresArgs& a, const Limits& limits, const std::string& place) {
  check_index_arena(a.kv, limits, place);
  require_countable(int64_t(limits.rows) * (limits.positions / kKeys + 1), place);
}

inline void check_extents_of(const BlockScoresArgs& a, const Limits& limits, const std::string& place) {
  check_index_arena(a.kv, limits, place);
  require_countable(int64_t(limits.rows) * (limits.positions / kKeys + 1), place);
}

inline void check_extents_of(const QkvArgs& a, const Limits& limits, const std::string& place) {
  check_arena(a.kv, a.kv_heads, limits, place);
  require_countable(int64_t(limits.rows) * (a.heads + 2 * int64_t(a.kv_heads)), place);
}

inline void check_extents_of(const LatentArgs& a, const Limits& limits, const std::string& place) {
  check_arena(a.kv, 1, limits, place);
  require_countable(int64_t(limits.rows) * (a.heads + 1), place);
}

inline void check_extents_of(const AttentionArgs& a, const Limits& limits, const std::string& place) {
  if (!a.fresh) check_arena(a.kv, a.kv_heads, limits, place);
  const int64_t split = std::min(limits.rows, limits.sequences);
  require_countable((limits.rows + split * (limits.positions / kKeys + 1)) * a.heads, place);
}

inline void check_extents_of(const GateArgs& a, const Limits& limits, const std::string& place) {
  require_countable(int64_t(limits.rows) * a.heads, place);
}

}  // namespace hybrid
