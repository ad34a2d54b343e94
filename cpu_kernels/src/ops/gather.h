// Keys and values that a row selected, brought together, so that attention works on them as on a short sequence.
#pragma once

#include "ops/qkv.h"

namespace hybrid {
namespace HYBRID_ISA {

// Selected keys of one row, side by side: a key block of which all is seen, as if a sequence had no more.
struct Gathered {
  AttentionArgs args;
  AttentionTile tile;
};

// One value of `dim` dimensions, from place to place in lines of values.
template <class Kv>
static HYBRID_INLINE void copy_value(char* to, const char* from, int dim) {
  constexpr int at_once = Kv::scaled ? kBlock : 1, apart = Kv::scaled ? kLine : 4, bytes = Kv::scaled ? kBlock : 2;
  for (int i = 0; i < dim / at_once; ++i) __builtin_memcpy(to + i * apart, from + i * apart, bytes);
}

// Their values, where these are not shared.
template <class Kv>
static HYBRID_INLINE void gather_values(const AttentionArgs& args, const AttentionTile& tile, int head,
                                        const int32_t* positions, int count, const KvLayout& into) {
  const int dim = args.kv.value_dim;
  if (count % kBlock)
    __builtin_memset(value_at<Kv>(into, 0, 0, count / kBlock * kBlock), 0, size_t(token_bytes<Kv>(dim)) * kBlock);
  for (int i = 0; i < count; ++i) {
    char* const to = value_at<Kv>(into, 0, 0, i);
    const char* const from = value_at<Kv>(args.kv, tile.sequence, head, positions[i]);
    if (!Kv::scaled && i % 2 == 0 && i + 1 < count && positions[i] % 2 == 0 && positions[i + 1] == positions[i] + 1) {
      __builtin_memcpy(to, from, 2 * size_t(token_bytes<Kv>(dim)));  // the lines of two tokens, at the same places
      ++i;
      continue;
    }
    copy_value<Kv>(to, from, dim);
    if constexpr (Kv::scaled) *value_scale(into, 0, 0, i) = *value_scale(args.kv, tile.sequence, head, positions[i]);
  }
}

// Key block `block` of those that the row of a tile selected, of one KV head, in scratch. What pads the last 16 is
// zero.
template <class Kv, bool shared>
static HYBRID_KERNEL void gather(const AttentionArgs& args, const AttentionTile& tile, int head, int block,
                                 char* scratch, Gathered& into) {
  const int32_t* positions = args.selected + int64_t(tile.row) * args.selects + block * kKeys;
  const int all = args.counts ? args.counts[tile.row] : args.selects, count = min(kKeys, all - block * kKeys);
  const int words = token_bytes<Kv>(args.kv.key_dim) / Kv::key_step;
  const GatheredOffsets at = gathered_offsets(args.kv);
  into.args = args;
  into.args.selected = into.args.counts = nullptr;
  KvLayout& kv = into.args.kv;
  kv.base = scratch;
  kv.sequence_stride = kv.head_stride = 0;
  kv.value_offset = at.values;
  kv.key_scales = at.key_scales;
  kv.value_scales = at.value_scales;
  into.tile = {tile.row, 1, 0, count - 1, 0, 0, 0};
  if (count % kBlock)
    __builtin_memset(key_at<Kv>(kv, 0, 0, count / kBlock * kBlock), 0, size_t(token_bytes<Kv>(kv.key_dim)) * kBlock);
  for (int i = 0; i < count; ++i) {
    const char* const from = key_at<Kv>(args.kv, tile.sequence, head, positions[i]);
    char* const to = key_at<Kv>(kv, 0, 0, i);
    for (int word = 0; word < words; ++word)
      __builtin_memcpy(to + word * kBlock * Kv::key_step, from + word * kBlock * Kv::key_step, Kv::key_step);
    if constexpr (Kv::scaled) *key_scale(kv, 0, 0, i) = *key_scale(args.kv, tile.sequence, head, positions[i]);
  }
  if constexpr (!shared) gather_values<Kv>(args, tile, head, positions, count, kv);
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
