// Logits between -cap and cap.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kCapBlocks = 64;  // of logits that a thread takes at once

static void soft_cap(const SoftCapArgs& args, const Step& step, const Work& work) {
  const int blocks = (args.columns + kBlock - 1) / kBlock;
  for_each(step.logit_rows * blocks, kCapBlocks, work, [&](int task) {
    const int row = task / blocks, column = task % blocks * kBlock, count = min(kBlock, args.columns - column);
    float* x = step.logits + int64_t(row) * args.columns + column;
    store_some(x, capped(load_some(x, count), args.cap), count);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
