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

// A token, as it is kept, comes to a run, whose keys and the matrix decay by it.
static HYBRID_INLINE void add_token(const float* key, const float* decays, int token, int dim, DeltaRun& run) {
  for (int i = 0; !token && i < dim; ++i) run.decays[i] = 1.0f;
  multiply_by(run.decays, decays, dim);
  for (int c = 0; c < token; ++c) multiply_by(run.keys + c * dim, decays, dim);
  __builtin_memcpy(run.keys + token * dim, key, dim * sizeof(float));
  run.key[token] = run.keys + token * dim;
}

static HYBRID_INLINE void add_kept(const DeltaState& state, int count, int dim, DeltaRun& run) {
  for (int token = 0; token < count; ++token)
    add_token(state.keys + token * dim, state.decays + token * dim, token, dim, run);
}

// The matrix decays when it takes the run: until then, new keys and queries bear its decay.
static HYBRID_KERNEL void read_tokens(const KimiDeltaArgs& args, int head, const DeltaState& state, DeltaTokens& t) {
  const int dim = args.key_dim;
  const float scale = 1.0f / __builtin_sqrtf(float(dim));
  alignas(64) float query[kMaxDeltaDim];
  float in_beta[kBlock] = {};
  if (t.begins) add_kept(state, kRunTokens, dim, t.last);
  add_kept(state, t.old, dim, t.run);
  for (int r = 0; r < t.count; ++r) {
    const int row = t.row + r, token = t.old + r;
    const float* x = args.input + int64_t(row) * args.input_stride + head * dim;
    float *key = state.keys + token * dim, *decays = state.decays + token * dim;
    float *on_matrix = t.keys + r * dim, *of_matrix = t.queries + r * dim;
    norm_key(x, query, dim, scale);
    norm_key(x + args.heads * dim, key, dim, 1.0f);
    channel_decays(args, row, head, decays);
    add_token(key, decays, token, dim, t.run);
    for (int c = 0; c <= token; ++c) {
      t.on_keys[r][c] = dot(t.run.key[c], key, dim);
      t.on_queries[r][c] = dot(t.run.key[c], query, dim);
    }
    __builtin_memcpy(on_matrix, key, dim * sizeof(float));
    __builtin_memcpy(of_matrix, query, dim * sizeof(float));
    multiply_by(on_matrix, t.run.decays, dim);
    multiply_by(of_matrix, t.run.decays, dim);
    t.decay[r] = 1.0f;
    in_beta[r] = args.betas[int64_t(row) * args.beta_stride + head];
  }
  const F32 b = Isa::load(in_beta);
  Isa::store(t.beta, unless_damaged(times_sigmoid(Isa::set(1.0f), b), b));
}

static void kimi_delta(const KimiDeltaArgs& args, const Step& step, const Work& work) {
  delta_rule<true>(
      args, args.heads, 2 * args.heads * args.key_dim, args.gates, args.gate_stride, step, work,
      [&](int head, const DeltaState& state, DeltaTokens& t) { read_tokens(args, head, state, t); },
      [](F32 y, F32 z) { return unless_damaged(times_sigmoid(y, z), z); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
