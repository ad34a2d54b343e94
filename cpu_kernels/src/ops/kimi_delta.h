// Kimi Delta Attention, the delta rule (delta.h) with a decay for each channel of keys.
#pragma once

#include "ops/delta.h"

namespace hybrid {
namespace HYBRID_ISA {

static HYBRID_INLINE void multiply_by(float* x, const float* factors, int dim) {
  for (int i = 0; i < dim; i += kBlock) {
    const int count = min(kBlock, dim - i);
    store_some(x + i, Isa::mul(load_some(x + i, count), load_some(factors + i, count)), count);
  }
}

// By which a token multiplies the channels of a matrix: e^(-rate softplus(x)), or with a bound e^(bound sigmoid(rate
// x)).
static HYBRID_INLINE void channel_decays(const KimiDeltaArgs& args, int row, int head, float* decays) {
  const int dim = args.key_dim, first = head * dim;
  const float* in = args.decays + int64_t(row) * args.decay_stride + first;
  const F32 rate = exponential(Isa::set(args.decay_rate[head]));
  for (int i = 0; i < dim; i += kBlock) {
    const int count = min(kBlock, dim - i);
    const F32 x = Isa::add(load_some(in + i, count), load_some(args.decay_bias + first + i, count));
    const F32 log = args.lower_bound < 0 ? times_sigmoid(Isa::set(args.lower_bound), Isa::mul(rate, x))
                                         : Isa::sub(Isa::zero(), Isa::mul(rate, softplus(x)));
    store_some(decays + i, unless_damaged(exponential(log), x), count);
  }
}

// Keys that are kept decay with every token that comes. The matrix does so when it is written: until then, new keys and
// queries bear its decay.
static HYBRID_KERNEL void read_tokens(const KimiDeltaArgs& args, int head, const DeltaState& state, DeltaTokens& t) {
  const int dim = args.key_dim;
  const float scale = 1.0f / __builtin_sqrtf(float(dim));
  alignas(64) float query[kMaxDeltaDim], decays[kMaxDeltaDim];
  float in_beta[kBlock] = {};
  for (int i = 0; !t.old && i < dim; ++i) state.decays[i] = 1.0f;
  for (int r = 0; r < t.count; ++r) {
    const int row = t.row + r, token = t.old + r;
    const float* x = args.input + int64_t(row) * args.input_stride + head * dim;
    float *key = t.key[token] = t.kept + r * dim, *on_matrix = t.keys + r * dim, *of_matrix = t.queries + r * dim;
    norm_key(x, query, dim, scale);
    norm_key(x + args.heads * dim, key, dim, 1.0f);
    channel_decays(args, row, head, decays);
    multiply_by(state.decays, decays, dim);
    for (int c = 0; c < token; ++c) multiply_by(t.key[c], decays, dim);
    for (int c = 0; c <= token; ++c) {
      t.on_keys[r][c] = dot(t.key[c], key, dim);
      t.on_queries[r][c] = dot(t.key[c], query, dim);
    }
    __builtin_memcpy(on_matrix, key, dim * sizeof(float));
    __builtin_memcpy(of_matrix, query, dim * sizeof(float));
    multiply_by(on_matrix, state.decays, dim);
    multiply_by(of_matrix, state.decays, dim);
    t.decay[r] = 1.0f;
    in_beta[r] = args.betas[int64_t(row) * args.beta_stride + head];
  }
  const F32 b = Isa::load(in_beta);
  Isa::store(t.beta, unless_damaged(times_sigmoid(Isa::set(1.0f), b), b));
}

static void kimi_delta(const KimiDeltaArgs& args, const Step& step, const Work& work) {
  delta_rule<true>(
      args, args.heads, delta_offsets(args.key_dim, args.value_dim, args.key_dim), 2 * args.heads * args.key_dim,
      args.gates, args.gate_stride, step, work,
      [&](int head, const DeltaState& state, DeltaTokens& t) { read_tokens(args, head, state, t); },
      [](F32 y, F32 z) { return unless_damaged(times_sigmoid(y, z), z); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
