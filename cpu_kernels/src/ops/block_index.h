// An indexer that selects blocks of keys for each KV head: what they are worth, and which are worth most.
#pragma once

#include "ops/index.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kIndexBlocks = kKeys / kIndexBlock;  // in a key block

// The largest of `count` products, or NaN if one of them is none or infinite.
static HYBRID_INLINE float largest_product(const float* x, int count) {
  F32 top = Isa::set(-__builtin_inff()), damage = Isa::zero();
  for (int i = 0; i < count; i += kBlock) {
    const int some = min(kBlock, count - i);
    const F32 products = Isa::load(x + i);
    top = Isa::max(top, Isa::keep(products, 0, some, -__builtin_inff()));
    damage = unless_damaged(damage, Isa::keep(products, 0, some, 0.0f));
  }
  return Isa::max_lane(top) + Isa::sum(damage);
}

static void block_scores(const BlockScoresArgs& args, const Step& step, const Work& work) {
  const Tiles<Bf16> tiles(Bf16{}, step, kMaxTileRows);
  const KvLayout keys = index_keys(args.kv);
  const int key_blocks = score_blocks(step), blocks = key_blocks * kIndexBlocks;
  for_each(step.rows * key_blocks, 1, work, [&](int task) {
    const int row = task / key_blocks, block = task % key_blocks, seen = step.positions[row] + 1 - block * kKeys;
    if (step.positions[row] / kIndexBlock < args.selects || seen <= 0) return;
    const float* products = block_products(tiles, args.q, args.heads, keys, step, row, block, work.scratch);
    for (int head = 0; head < args.heads; ++head)
      for (int part = 0; part < kIndexBlocks && part * kIndexBlock < seen; ++part)
        args.scores[(int64_t(row) * args.heads + head) * blocks + block * kIndexBlocks + part] =
            largest_product(products + head * kKeys + part * kIndexBlock, min(kIndexBlock, seen - part * kIndexBlock));
  });
}

static void select_blocks(const SelectBlocksArgs& args, const Step& step, const Work& work) {
  const int64_t stride = int64_t(score_blocks(step)) * kIndexBlocks;
  for_each(step.rows, 1, work, [&](int row) {
    const int own = step.positions[row] / kIndexBlock;
    if (own < args.selects) return;
    bool sound = true;
    for (int head = 0; head < args.heads; ++head) {
      const float* scores = args.scores + (int64_t(row) * args.heads + head) * stride;
      int32_t* chosen = args.selected + (int64_t(row) * args.heads + head) * args.selects;
      const bool finite = __builtin_isfinite(largest_magnitude(scores, own + 1));
      sound = sound && finite;
      if (finite) select_largest(scores, own, args.selects - 1, chosen);
      for (int i = 0; !finite && i < args.selects - 1; ++i) chosen[i] = i;
      chosen[args.selects - 1] = own;
    }
    if (!sound) spoil(args.q + int64_t(row) * args.query_stride, args.query_stride);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
