// The gated delta rule (delta.h): one decay of a whole matrix; a key head serves several value heads.
#pragma once

#include "ops/delta.h"

namespace hybrid {
namespace HYBRID_ISA {

static HYBRID_KERNEL void read_tokens(const GatedDeltaArgs& args, int head, const DeltaState& state, DeltaTokens& t) {
  const int dim = args.key_dim;
  const int key_head = args.in_turn ? head % args.key_heads : head / (args.value_heads / args.key_heads);
  const float scale = 1.0f / __builtin_sqrtf(float(dim));
  read_kept(state, t);
  float in_decay[kBlock] = {}, in_beta[kBlock] = {}, decays[kBlock];
  for (int r = 0; r < t.count; ++r) {
    const float* x = args.input + int64_t(t.row + r) * args.input_stride + key_head * dim;
    norm_key(x, t.queries + r * dim, dim, scale);
    norm_key(x + args.key_heads * dim, t.keys + r * dim, dim, 1.0f);
    t.run.key[t.old + r] = t.keys + r * dim;
    const float* gates = args.decays + int64_t(t.row + r) * args.decay_stride + head;
    in_beta[r] = gates[0];
    in_decay[r] = gates[args.value_heads];
  }
  const F32 b = Isa::load(in_beta), a = Isa::add(Isa::load(in_decay), Isa::set(args.decay_bias[head]));
  Isa::store(t.beta, unless_damaged(times_sigmoid(Isa::set(args.beta_scale != 0 ? args.beta_scale : 1.0f), b), b));
  const F32 rate = Isa::mul(exponential(Isa::set(args.decay_rate[head])), softplus(a));
  Isa::store(decays, unless_damaged(exponential(Isa::sub(Isa::zero(), rate)), a));
  keep(decays, state, t);
  for (int r = 0; r < t.count; ++r) {
    const int token = t.old + r;
    add_decay(decays[r], token, t.run);
    t.decay[r] = t.run.decays[0];
    for (int c = 0; c <= token; ++c) {
      t.on_keys[r][c] = t.run.decays[1 + c] * dot(t.run.key[c], t.keys + r * dim, dim);
      t.on_queries[r][c] = t.run.decays[1 + c] * dot(t.run.key[c], t.queries + r * dim, dim);
    }
  }
}

static void gated_delta(const GatedDeltaArgs& args, const Step& step, const Work& work) {
  const int keys = 2 * args.key_heads * args.key_dim, values = args.value_heads * args.value_dim;
  delta_rule<false>(
      args, args.value_heads, keys, args.input + keys + values, args.input_stride, step, work,
      [&](int head, const DeltaState& state, DeltaTokens& t) { read_tokens(args, head, state, t); },
      [&](F32 y, F32 z) { return args.sigmoid ? unless_damaged(times_sigmoid(y, z), z) : Isa::mul(y, silu(z)); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
