// The state space of Mamba-2. As in the delta rule (delta.h), a matrix is read by every token and takes runs, whose B
// and dt x are kept beside it. With S the matrix without the run, D its decay since then and d_c that since token c
// came, token t finds
//   y_t = D S C_t + sum over c <= t of d_c (B_c . C_t) dt_c x_c + skip x_t,
// and S becomes D S + sum over c of d_c dt_c x_c B_c^T.
#pragma once

#include "ops/delta.h"

namespace hybrid {
namespace HYBRID_ISA {

struct SpaceTokens : RunTokens {  // keys: B; values: dt x
  float dt[kBlock];
  float decay[kRunTokens];                                     // of the matrix, when each new token comes
  const float* query[kRunTokens];                              // C of new tokens
  float scores[kRunTokens][kRunTokens];                        // d_c (B_c . C_t), [new token][token]
  alignas(64) float found[kRunTokens][kDeltaBlocks * kBlock];  // S C of some blocks of x
};

static HYBRID_INLINE void read_tokens(const StateSpaceArgs& args, int head, const DeltaState& state, SpaceTokens& t) {
  const int dim = args.state_dim, inner = args.heads * args.head_dim, group = head / (args.heads / args.groups);
  float steps[kBlock] = {}, decays[kBlock];
  read_kept(state, t);
  for (int r = 0; r < t.count; ++r) {
    const float* b = args.values + int64_t(t.row + r) * args.stride + inner + group * dim;
    t.run.key[t.old + r] = b;
    t.query[r] = b + args.groups * dim;
    steps[r] = args.steps[int64_t(t.row + r) * args.step_stride + head];
  }
  const F32 step = Isa::add(Isa::load(steps), Isa::set(args.bias[head]));
  const F32 within = min(Isa::max(softplus(step), Isa::set(args.smallest)), Isa::set(args.largest));
  const F32 dt = unless_damaged(within, step), rate = exponential(Isa::set(args.rate[head]));
  Isa::store(t.dt, dt);
  Isa::store(decays, unless_damaged(exponential(Isa::sub(Isa::zero(), Isa::mul(rate, dt))), step));
  keep(decays, state, t);
  for (int r = 0; r < t.count; ++r) {
    const int token = t.old + r;
    add_decay(decays[r], token, t.run);
    t.decay[r] = t.run.decays[0];
    for (int c = 0; c <= token; ++c) t.scores[r][c] = t.run.decays[1 + c] * dot(t.run.key[c], t.query[r], dim);
  }
}

// What `rows` new tokens find in `blocks` blocks of the matrix.
template <int rows, int blocks>
static HYBRID_INLINE void find(const float* matrix, int first, SpaceTokens& t) {
  F32 sums[rows][blocks];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < blocks; ++j) sums[r][j] = Isa::zero();
  for (int i = 0; i < t.key_dim; ++i) {
    F32 s[blocks];
    for (int j = 0; j < blocks; ++j) s[j] = Isa::load(matrix + (int64_t(j) * t.key_dim + i) * kBlock);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F32 c = Isa::set(t.query[first + r][i]);
      for (int j = 0; j < blocks; ++j) sums[r][j] = Isa::fma(c, s[j], sums[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < blocks; ++j) Isa::store(t.found[first + r] + j * kBlock, sums[r][j]);
}

template <int blocks>
static HYBRID_INLINE void find_all(const float* matrix, SpaceTokens& t) {
  int first = 0;
  for (; first + kDeltaRows <= t.count; first += kDeltaRows) find<kDeltaRows, blocks>(matrix, first, t);
  for (; first < t.count; ++first) find<1, blocks>(matrix, first, t);
}

// What comes out of up to 16 dimensions of x, which it replaces; dt x of new tokens goes to `values` in the state.
static HYBRID_INLINE void write_rows(const StateSpaceArgs& args, int head, int block, float* values, SpaceTokens& t) {
  const int at = block * kBlock, count = min(kBlock, args.head_dim - at);
  const int gates = args.heads * args.head_dim + 2 * args.groups * args.state_dim;
  const F32 skip = Isa::set(args.skip[head]);
  for (int r = 0; r < t.count; ++r) {
    const int token = t.old + r;
    float* x = args.values + int64_t(t.row + r) * args.stride + head * args.head_dim + at;
    const F32 value = load_some(x, count), u = Isa::mul(Isa::set(t.dt[r]), value);
    F32 out = Isa::mul(Isa::set(t.decay[r]), Isa::load(t.found[r] + block % kDeltaBlocks * kBlock));
    for (int c = 0; c < token; ++c) out = Isa::fma(Isa::set(t.scores[r][c]), Isa::load(values + c * t.padded), out);
    Isa::store(values + token * t.padded, u);
    out = Isa::fma(skip, value, Isa::fma(Isa::set(t.scores[r][token]), u, out));
    store_some(x, Isa::mul(out, silu(load_some(x + gates, count))), count);
  }
}

static HYBRID_KERNEL void space_tokens(const StateSpaceArgs& args, int head, const DeltaState& state, SpaceTokens& t) {
  read_tokens(args, head, state, t);
  pass_over<false>(state, t, [&](int block) { write_rows(args, head, block, state.values + block * kBlock, t); });
}

static void state_space(const StateSpaceArgs& args, const Step& step, const Work& work) {
  SpaceTokens t;
  t.key_dim = args.state_dim;
  t.padded = (args.head_dim + kBlock - 1) / kBlock * kBlock;
  for_runs(args, args.heads, delta_offsets(args.state_dim, args.head_dim, false), step, work, t,
           [&](int head, const DeltaState& state) { space_tokens(args, head, state, t); });
}

static void group_norm(const GroupNormArgs& args, const Step& step, const Work& work) {
  const int size = args.width / args.groups;
  for_each(step.rows * args.groups, 1, work, [&](int item) {
    const int row = item / args.groups, first = item % args.groups * size;
    const float *x = args.input + int64_t(row) * args.input_stride + first, *weight = args.weight + first;
    bf16* out = args.output + int64_t(row) * args.output_stride + first;
    const F32 scale = Isa::set(inverse_rms(x, size, args.eps));
    for (int i = 0; i < size; i += kBlock) {
      const int count = min(kBlock, size - i);
      store_some_bf16(out + i, Isa::mul(Isa::mul(load_some(x + i, count), scale), load_some(weight + i, count)), count);
    }
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
