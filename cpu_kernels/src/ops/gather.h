// Keys that a row selected, brought together, so that attention works on them as on those of a short sequence.
#pragma once

#include "ops/qkv.h"

namespace hybrid {
namespace HYBRID_ISA {

// Selected keys of one row, side by side: a key block of which all is seen, as if a sequence had no more.
struct Gathered {
  AttentionArgs args;
  AttentionTile tile;
};

// Key block `block` of those that the row of a tile selected, in scratch. What pads the last 16 is zero.
template <class Kv>
static HYBRID_KERNEL void gather(const AttentionArgs& args, const AttentionTile& tile, int block, char* scratch,
                                 Gathered& into) {
  const int32_t* positions = args.selected + int64_t(tile.row) * args.selects + block * kKeys;
  const int all = args.counts ? args.counts[tile.row] : args.selects, count = min(kKeys, all - block * kKeys);
  const int words = token_bytes<Kv>(args.kv.key_dim) / Kv::key_step;
  const char* const entries = kv_head(args.kv, tile.sequence, 0) + args.kv.entry_offset;
  into.args = args;
  into.args.selected = into.args.counts = nullptr;
  KvLayout& kv = into.args.kv;
  kv.base = scratch;
  kv.sequence_stride = 0;
  kv.key_scales = kv.value_scales = kKeys * token_bytes<Kv>(kv.key_dim);
  into.tile = {tile.row, 1, 0, count - 1, 0, 0, 0};
  if (count % kBlock)
    __builtin_memset(key_at<Kv>(kv, 0, 0, count / kBlock * kBlock), 0, size_t(token_bytes<Kv>(kv.key_dim)) * kBlock);
  for (int i = 0; i < count; ++i) {
    const bool is_entry = positions[i] < 0;
    const char* from =
        is_entry ? entries + ~positions[i] * args.kv.entry_bytes : key_at<Kv>(args.kv, tile.sequence, 0, positions[i]);
    const int apart = is_entry ? Kv::key_step : kBlock * Kv::key_step;
    char* to = key_at<Kv>(kv, 0, 0, i);
    for (int word = 0; word < words; ++word)
      __builtin_memcpy(to + word * kBlock * Kv::key_step, from + word * apart, Kv::key_step);
    if constexpr (Kv::scaled) {
      const char* scale = is_entry ? from + token_bytes<Kv>(args.kv.key_dim)
                                   : reinterpret_cast<char*>(key_scale(args.kv, tile.sequence, 0, positions[i]));
      __builtin_memcpy(key_scale(kv, 0, 0, i), scale, sizeof(float));
    }
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
