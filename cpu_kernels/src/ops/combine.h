// The sum over the experts of a row where some were computed elsewhere: the same additions in the same order as those
// of `down`, so that who computed an expert cannot be seen in the result.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kCombineBlocks = 16;  // blocks of a row that a thread adds at a time

// The place in ids [top_k] of the smallest id above `last`, or -1. Ids of a row differ.
static HYBRID_INLINE int next_expert(const int32_t* ids, int top_k, int last) {
  int best = -1;
  for (int i = 0; i < top_k; ++i)
    if (ids[i] > last && (best < 0 || ids[i] < ids[best])) best = i;
  return best;
}

// Clearing writes -0: added to it, whatever a contribution is stays what it is, -0 included.
static HYBRID_KERNEL void combine_blocks(const CombineArgs& args, int row, Range blocks) {
  const int32_t* ids = args.ids + int64_t(row) * args.top_k;
  float* out = args.output + int64_t(row) * args.output_stride;
  const F32 cleared = Isa::set(-0.0f);
  for (int at = next_expert(ids, args.top_k, -1); at >= 0; at = next_expert(ids, args.top_k, ids[at])) {
    const int64_t pair = int64_t(row) * args.top_k + at;
    const F32 weight = Isa::set(args.weights[pair]);
    float* from = args.contributions + pair * args.stride;
    for (int column = blocks.first * kBlock; column < blocks.last * kBlock; column += kBlock) {
      Isa::store(out + column, Isa::fma(weight, Isa::load(from + column), Isa::load(out + column)));
      Isa::store(from + column, cleared);
    }
  }
}

static void combine(const CombineArgs& args, const Step& step, const Work& work) {
  const int blocks = (args.width + kBlock - 1) / kBlock;
  const int parts = (blocks + kCombineBlocks - 1) / kCombineBlocks;
  for_runs(step.rows * parts, 1, work, [&](Range run) {
    for (int i = run.first; i < run.last; ++i) {
      const int first = i % parts * kCombineBlocks;
      combine_blocks(args, i / parts, {first, min(blocks, first + kCombineBlocks)});
    }
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
