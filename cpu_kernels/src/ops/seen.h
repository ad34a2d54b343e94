// Which keys a row of a tile sees, and in which key blocks it sees any.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

// Whether row `row` of a tile sees but the keys that it selected.
static HYBRID_INLINE bool selects(const AttentionArgs& args, const AttentionTile& tile, int row) {
  if (args.counts) return args.counts[tile.row + row] > 0;
  return args.selected && tile.position + row >= args.selects;
}

// One past the last key that row `row` of a tile may see here; of those that it selected, how many.
static HYBRID_INLINE int end_of(const AttentionArgs& args, const AttentionTile& tile, int row) {
  if (selects(args, tile, row)) return args.counts ? args.counts[tile.row + row] : args.selects;
  const int end = tile.position + row + 1;
  return args.ends ? min(end, args.ends[tile.row]) : end;
}

// Which halves of key block `block` row `row` of a tile sees with a KV head: bits, the first half's the lowest.
static HYBRID_INLINE int halves(const AttentionArgs& args, const AttentionTile& tile, int row, int kv_head, int block) {
  static_assert(kIndexBlock * 2 == kKeys, "what is selected is half a key block");
  if (!args.blocks || (tile.position + row) / kIndexBlock < args.block_count) return 3;
  const int32_t* chosen = args.blocks + (int64_t(tile.row + row) * args.kv_heads + kv_head) * args.block_count;
  int found = 0;
  for (int i = 0; i < args.block_count; ++i) found |= (chosen[i] >> 1) == block ? 1 << (chosen[i] & 1) : 0;
  return found;
}

// The keys of block `block` that row `row` of a tile sees, counted from the block's first.
static HYBRID_INLINE Range visible(const AttentionArgs& args, const AttentionTile& tile, int row, int kv_head,
                                   int block) {
  const int first = args.window ? max(0, tile.position + row - args.window + 1 - block * kKeys) : 0;
  const Range all{min(first, kKeys), min(end_of(args, tile, row) - block * kKeys, kKeys)};
  if (!args.blocks) return all;
  const int seen = halves(args, tile, row, kv_head, block);
  return {seen & 1 ? all.first : kIndexBlock, seen & 2 ? all.last : min(all.last, kIndexBlock)};
}

// The first key block from `block` on of which any row of a tile sees something with a KV head, or `end`.
static HYBRID_INLINE int next_seen(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int block,
                                   int end) {
  if (!args.blocks) return block;
  for (; block < end; ++block)
    for (int row = 0; row < tile.rows; ++row)
      if (halves(args, tile, row, kv_head, block)) return block;
  return end;
}

// The first key block of which the query at `position` sees anything.
static HYBRID_INLINE int first_block(const AttentionArgs& args, int position) {
  return args.window ? max(0, position - args.window + 1) / kKeys : 0;
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
