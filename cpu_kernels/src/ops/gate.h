// What attention made, times the sigmoid or softplus of a gate, for each value or each head.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

static HYBRID_INLINE F32 load_some_bf16(const bf16* p, int count) {
  bf16 lanes[kBlock] = {};
  if (count != kBlock)
    for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return Isa::from_bf16(reinterpret_cast<const char*>(count == kBlock ? p : lanes));
}

static HYBRID_INLINE F32 gated(F32 x, F32 gate, bool is_softplus) {
  return unless_damaged(is_softplus ? Isa::mul(x, softplus(gate)) : times_sigmoid(x, gate), gate);
}

static void gate(const GateArgs& args, const Step& step, const Work& work) {
  for_each(step.rows * args.heads, 4, work, [&](int task) {
    const int row = task / args.heads, head = task % args.heads;
    bf16* x = args.values + int64_t(row) * args.stride + head * args.head_dim;
    const float* gates = args.gates + int64_t(row) * args.gate_stride + int64_t(head) * args.gate_head_stride;
    for (int i = 0; i < args.head_dim; i += kBlock) {
      const int count = min(kBlock, args.head_dim - i);
      const F32 g = args.per_head ? Isa::set(*gates) : load_some(gates + i, count);
      store_some_bf16(x + i, gated(load_some_bf16(x + i, count), g, args.softplus), count);
    }
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
