// The gated delta rule. A matrix is read by every token, but written only when kDeltaTokens tokens have come: until
// then their keys, and the corrections that they are worth, are kept beside it. With S the matrix as it was last
// written, D its decay since then and d_c that since token c came, token t finds
//   u_t = beta_t (v_t - D S^T k_t - sum over c < t of d_c (k_c . k_t) u_c),
//   o_t = D S^T q_t + sum over c <= t of d_c (k_c . q_t) u_c,
// and with the last token S becomes D S + sum over c of d_c k_c u_c^T. Which tokens belong together depends on their
// positions alone, and every sum has one order: so it makes no difference how a sequence is cut into steps.
#pragma once

#include "ops/norm.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kDeltaBlocks = 2;  // blocks of values that stay in L1 while tokens pass over them
constexpr int kDeltaRows = Isa::max_rows * Isa::max_blocks < 16 ? 2 : 4;  // tokens whose sums stay in registers
constexpr float kKeyEps = 1e-6f;                                          // of the norms of keys and queries

// The state of a value head of one sequence.
struct DeltaState {
  float *matrix, *keys, *values, *decays;
};

// Tokens that are written together: `old` of earlier steps, whose keys are in the state, and `count` from `row` on.
struct DeltaTokens {
  int row, old, count;
  int key_dim, padded;  // padded: values in whole blocks
  bool complete;
  float beta[kBlock];
  float decay[kDeltaTokens];                                          // of the matrix, when each new token comes
  const float* key[kDeltaTokens];                                     // of all tokens
  float on_keys[kDeltaTokens][kDeltaTokens];                          // d_c (k_c . k_t), [new token][token]
  float on_queries[kDeltaTokens][kDeltaTokens];                       // d_c (k_c . q_t)
  alignas(64) float keys[kDeltaTokens * kMaxDeltaDim];                // of new tokens, normed
  alignas(64) float queries[kDeltaTokens * kMaxDeltaDim];             //
  alignas(64) float output[kDeltaTokens * kMaxDeltaDim];              //
  alignas(64) float by_keys[kDeltaTokens][kDeltaBlocks * kBlock];     // S^T k of some blocks of values
  alignas(64) float by_queries[kDeltaTokens][kDeltaBlocks * kBlock];  // S^T q
};

static HYBRID_INLINE float dot(const float* a, const float* b, int width) {
  F32 sum = Isa::zero();
  for (int i = 0; i < width; i += kBlock) {
    const int count = min(kBlock, width - i);
    sum = Isa::fma(load_some(a + i, count), load_some(b + i, count), sum);
  }
  return Isa::sum(sum);
}

// x / sqrt(sum(x^2) + eps) * scale. NaN where the squares overflow.
static HYBRID_INLINE void norm_key(const float* x, float* out, int dim, float scale) {
  const float sum = sum_of_squares(x, dim);
  const F32 factor = Isa::set(scale / __builtin_sqrtf(sum + kKeyEps) + 0.0f * sum);
  for (int i = 0; i < dim; i += kBlock) {
    const int count = min(kBlock, dim - i);
    store_some(out + i, Isa::mul(load_some(x + i, count), factor), count);
  }
}

static HYBRID_INLINE void read_tokens(const GatedDeltaArgs& args, int head, const DeltaState& state, DeltaTokens& t) {
  const int dim = args.key_dim;
  const int key_head = args.in_turn ? head % args.key_heads : head / (args.value_heads / args.key_heads);
  const float scale = 1.0f / __builtin_sqrtf(float(dim));
  float in_decay[kBlock] = {}, in_beta[kBlock] = {}, decays[kBlock];
  for (int c = 0; c < t.old; ++c) t.key[c] = state.keys + c * dim;
  for (int r = 0; r < t.count; ++r) {
    const float* x = args.input + int64_t(t.row + r) * args.input_stride + key_head * dim;
    norm_key(x, t.queries + r * dim, dim, scale);
    norm_key(x + args.key_heads * dim, t.keys + r * dim, dim, 1.0f);
    t.key[t.old + r] = t.keys + r * dim;
    const float* gates = args.decays + int64_t(t.row + r) * args.decay_stride + head;
    in_beta[r] = gates[0];
    in_decay[r] = gates[args.value_heads];
  }
  const F32 b = Isa::load(in_beta), a = Isa::add(Isa::load(in_decay), Isa::set(args.decay_bias[head]));
  Isa::store(t.beta, unless_damaged(times_sigmoid(Isa::set(1.0f), b), b));
  const F32 rate = Isa::mul(exponential(Isa::set(args.decay_rate[head])), softplus(a));
  Isa::store(decays, unless_damaged(exponential(Isa::sub(Isa::zero(), rate)), a));
  if (!t.old) state.decays[0] = 1.0f;
  for (int r = 0; r < t.count; ++r) {
    const int token = t.old + r;
    for (int c = 0; c <= token; ++c) state.decays[c] *= decays[r];
    state.decays[1 + token] = 1.0f;
    t.decay[r] = state.decays[0];
    for (int c = 0; c <= token; ++c) {
      t.on_keys[r][c] = state.decays[1 + c] * dot(t.key[c], t.keys + r * dim, dim);
      t.on_queries[r][c] = state.decays[1 + c] * dot(t.key[c], t.queries + r * dim, dim);
    }
  }
}

// What `rows` new tokens find in `blocks` blocks of the matrix.
template <int rows, int blocks>
static HYBRID_INLINE void find(const float* matrix, int first, DeltaTokens& t) {
  const int dim = t.key_dim;
  const float *k = t.keys + first * dim, *q = t.queries + first * dim;
  F32 by_keys[rows][blocks], by_queries[rows][blocks];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < blocks; ++j) by_keys[r][j] = by_queries[r][j] = Isa::zero();
  for (int i = 0; i < dim; ++i) {
    F32 s[blocks];
    for (int j = 0; j < blocks; ++j) s[j] = Isa::load(matrix + (int64_t(j) * dim + i) * kBlock);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F32 key = Isa::set(k[r * dim + i]), query = Isa::set(q[r * dim + i]);
      for (int j = 0; j < blocks; ++j) {
        by_keys[r][j] = Isa::fma(key, s[j], by_keys[r][j]);
        by_queries[r][j] = Isa::fma(query, s[j], by_queries[r][j]);
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < blocks; ++j) {
      Isa::store(t.by_keys[first + r] + j * kBlock, by_keys[r][j]);
      Isa::store(t.by_queries[first + r] + j * kBlock, by_queries[r][j]);
    }
  }
}

template <int blocks>
static HYBRID_INLINE void find_all(const float* matrix, DeltaTokens& t) {
  int first = 0;
  for (; first + kDeltaRows <= t.count; first += kDeltaRows) find<kDeltaRows, blocks>(matrix, first, t);
  for (; first < t.count; ++first) find<1, blocks>(matrix, first, t);
}

// The corrections u_t of 16 values, at `values` in the state, and what queries find. input: values of the first token.
static HYBRID_INLINE void correct(const GatedDeltaArgs& args, const float* input, int block, int count, float* values,
                                  DeltaTokens& t) {
  for (int r = 0; r < t.count; ++r) {
    const int token = t.old + r, at = block % kDeltaBlocks * kBlock;
    F32 known = Isa::mul(Isa::set(t.decay[r]), Isa::load(t.by_keys[r] + at));
    F32 out = Isa::mul(Isa::set(t.decay[r]), Isa::load(t.by_queries[r] + at));
    for (int c = 0; c < token; ++c) {
      const F32 u = Isa::load(values + c * t.padded);
      known = Isa::fma(Isa::set(t.on_keys[r][c]), u, known);
      out = Isa::fma(Isa::set(t.on_queries[r][c]), u, out);
    }
    const F32 v = load_some(input + int64_t(r) * args.input_stride, count);
    const F32 u = Isa::mul(Isa::set(t.beta[r]), Isa::sub(v, known));
    Isa::store(values + token * t.padded, u);
    Isa::store(t.output + r * t.padded + block * kBlock, Isa::fma(Isa::set(t.on_queries[r][token]), u, out));
  }
}

// Writes all tokens into one block of the matrix.
template <class Tokens>
static HYBRID_INLINE void write(float* matrix, const float* decays, const float* values, const Tokens& t) {
  F32 u[kDeltaTokens];
  for (int c = 0; c < kDeltaTokens; ++c) u[c] = Isa::mul(Isa::set(decays[1 + c]), Isa::load(values + c * t.padded));
  const F32 decay = Isa::set(decays[0]);
  for (int i = 0; i < t.key_dim; ++i) {
    F32 s = Isa::mul(decay, Isa::load(matrix + i * kBlock));
#pragma GCC unroll 8
    for (int c = 0; c < kDeltaTokens; ++c) s = Isa::fma(Isa::set(t.key[c][i]), u[c], s);
    Isa::store(matrix + i * kBlock, s);
  }
}

static HYBRID_KERNEL void delta_tokens(const GatedDeltaArgs& args, int head, const DeltaState& state, DeltaTokens& t) {
  read_tokens(args, head, state, t);
  const int keys = 2 * args.key_heads * args.key_dim, blocks = t.padded / kBlock;
  const float* input = args.input + int64_t(t.row) * args.input_stride + keys + head * args.value_dim;
  for (int first = 0; first < blocks; first += kDeltaBlocks) {
    float* matrix = state.matrix + int64_t(first) * t.key_dim * kBlock;
    const bool both = first + kDeltaBlocks <= blocks;
    both ? find_all<kDeltaBlocks>(matrix, t) : find_all<1>(matrix, t);
    for (int block = first; block < (both ? first + kDeltaBlocks : blocks); ++block) {
      const int at = block * kBlock;
      correct(args, input + at, block, min(kBlock, args.value_dim - at), state.values + at, t);
      if (t.complete) write(state.matrix + int64_t(at) * t.key_dim, state.decays, state.values + at, t);
    }
  }
  if (!t.complete) __builtin_memcpy(state.keys + t.old * t.key_dim, t.keys, t.count * t.key_dim * sizeof(float));
}

// What new tokens found, normed and gated.
static HYBRID_INLINE void write_rows(const GatedDeltaArgs& args, int head, const DeltaTokens& t) {
  const int dim = args.value_dim;
  const int gates = 2 * args.key_heads * args.key_dim + args.value_heads * dim + head * dim;
  for (int r = 0; r < t.count; ++r) {
    const float *x = t.output + r * t.padded, *z = args.input + int64_t(t.row + r) * args.input_stride + gates;
    bf16* out = args.output + int64_t(t.row + r) * args.output_stride + head * dim;
    const F32 scale = Isa::set(inverse_rms(x, dim, args.eps));
    for (int i = 0; i < dim; i += kBlock) {
      const int count = min(kBlock, dim - i);
      const F32 y = Isa::mul(Isa::mul(load_some(x + i, count), scale), load_some(args.norm + i, count));
      store_some_bf16(out + i, Isa::mul(y, silu(load_some(z + i, count))), count);
    }
  }
}

static void gated_delta(const GatedDeltaArgs& args, const Step& step, const Work& work) {
  const DeltaOffsets at = delta_offsets(args.key_dim, args.value_dim);
  DeltaTokens t;
  t.key_dim = args.key_dim;
  t.padded = (args.value_dim + kBlock - 1) / kBlock * kBlock;
  for_each(args.value_heads, 1, work, [&](int head) {
    for (int row = 0; row < step.rows; row += t.count) {
      const int sequence = step.sequences[row];
      float* matrix = reinterpret_cast<float*>(args.state.base + sequence * args.state.sequence_stride) + head * at.end;
      t.row = row;
      t.old = step.positions[row] % kDeltaTokens;
      t.count = 1;
      while (t.old + t.count < kDeltaTokens && row + t.count < step.rows && step.sequences[row + t.count] == sequence)
        ++t.count;
      t.complete = t.old + t.count == kDeltaTokens;
      delta_tokens(args, head, {matrix, matrix + at.keys, matrix + at.values, matrix + at.decays}, t);
      write_rows(args, head, t);
    }
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
