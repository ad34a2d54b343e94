// The partial sums of memory nodes, joined in shared memory.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kJoinBlocks = 16;

// One block of one row. The order of the nodes is fixed, so the sum does not depend on how many threads each has.
static HYBRID_INLINE void join_block(const JoinArgs& args, int64_t at, int count) {
  F32 sum = load_some(args.output + at, count);
  for (int node = 0; node < args.partials.count; ++node) {
    float* partial = args.partials.of[node] + at;
    sum = Isa::add(sum, load_some(partial, count));
    store_some(partial, Isa::zero(), count);
  }
  store_some(args.output + at, sum, count);
}

static void join(const JoinArgs& args, const Step& step, const Work& work) {
  const int blocks = (args.width + kBlock - 1) / kBlock;
  for_each(step.rows * blocks, kJoinBlocks, work, [&](int i) {
    const int column = i % blocks * kBlock;
    join_block(args, int64_t(i / blocks) * args.output_stride + column, min(kBlock, args.width - column));
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
