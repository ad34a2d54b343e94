// Logits between -cap and cap.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kCapBlocks = 64;  // of logits that a thread takes at once

// tanh(z) is 2 sigmoid(2 z) - 1.
static void soft_cap(const SoftCapArgs& args, const Step& step, const Work& work) {
  const int blocks = (args.columns + kBlock - 1) / kBlock;
  const F32 cap = Isa::set(args.cap), twice = Isa::set(2.0f / args.cap);
  for_each(step.logit_rows * blocks, kCapBlocks, work, [&](int task) {
    const int row = task / blocks, column = task % blocks * kBlock, count = min(kBlock, args.columns - column);
    float* x = step.logits + int64_t(row) * args.columns + column;
    const F32 logits = load_some(x, count);
    const F32 bounded = Isa::sub(times_sigmoid(Isa::set(2.0f), Isa::mul(logits, twice)), Isa::set(1.0f));
    store_some(x, unless_damaged(Isa::mul(bounded, cap), logits), count);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
