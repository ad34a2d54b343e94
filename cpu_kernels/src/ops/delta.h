// The delta rule, whatever decays a matrix. A matrix is read by every token, but takes a run of kRunTokens tokens at
// once, when the first token behind them comes: until then their keys, and the corrections that they are worth, are
// kept beside it. With S the matrix without the run, D its decay since then and d_c that since token c came, token t
// finds
//   u_t = beta_t (v_t - S^T D k_t - sum over c < t of (d_c k_c . k_t) u_c),
//   o_t = S^T D q_t + sum over c <= t of (d_c k_c . q_t) u_c,
// and S becomes D S + sum over c of d_c k_c u_c^T. Which tokens are a run depends on their positions alone, and every
// sum has one order: so it makes no difference how a sequence is cut into steps. What is kept of a token does not
// depend on those behind it: so a sequence may go back within a run. D and d_c are numbers (gated_delta.h), or one for
// each channel of keys (kimi_delta.h).
#pragma once

#include "ops/norm.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kDeltaBlocks = 2;  // blocks of values that stay in L1 while tokens pass over them
constexpr int kDeltaRows = Isa::max_rows * Isa::max_blocks < 16 ? 2 : 4;  // tokens whose sums stay in registers
constexpr float kKeyEps = 1e-6f;                                          // of the norms of keys and queries

// The state of a value head of one sequence, see DeltaOffsets.
struct DeltaState {
  float *matrix, *keys, *values, *decays;
};

// What a matrix takes of a run: its keys and decays, of the matrix and then of each token. Where channels decay by
// themselves decays are those of the matrix, and keys have decayed.
struct DeltaRun {
  const float* key[kRunTokens];
  alignas(64) float decays[kMaxDeltaDim];
  alignas(64) float keys[kRunTokens * kMaxDeltaDim];  // where `key` points, if that is not elsewhere
};

// Tokens of a run: `old` of earlier steps, whose keys are in the state, and `count` from `row` on.
struct RunTokens {
  int row, old, count;
  int key_dim, padded;  // padded: values in whole blocks
  bool begins;          // a run, with tokens before it in the state, which the matrix takes first
  bool followed;        // by tokens of the next run: the matrix takes it at once
  DeltaRun run, last;   // last: that before it, if it begins
};

struct DeltaTokens : RunTokens {
  float beta[kBlock];
  float decay[kRunTokens];                                          // of what the matrix answers, of each new token
  float on_keys[kRunTokens][kRunTokens];                            // d_c k_c . k_t, [new token][token]
  float on_queries[kRunTokens][kRunTokens];                         // d_c k_c . q_t
  alignas(64) float keys[kRunTokens * kMaxDeltaDim];                // by which new tokens multiply the matrix
  alignas(64) float queries[kRunTokens * kMaxDeltaDim];             //
  alignas(64) float output[kRunTokens * kMaxDeltaDim];              //
  alignas(64) float by_keys[kRunTokens][kDeltaBlocks * kBlock];     // S^T k of some blocks of values
  alignas(64) float by_queries[kRunTokens][kDeltaBlocks * kBlock];  // S^T q
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
static HYBRID_INLINE void correct(const float* input, int stride, int block, int count, float* values, DeltaTokens& t) {
  for (int r = 0; r < t.count; ++r) {
    const int token = t.old + r, at = block % kDeltaBlocks * kBlock;
    F32 known = Isa::mul(Isa::set(t.decay[r]), Isa::load(t.by_keys[r] + at));
    F32 out = Isa::mul(Isa::set(t.decay[r]), Isa::load(t.by_queries[r] + at));
    for (int c = 0; c < token; ++c) {
      const F32 u = Isa::load(values + c * t.padded);
      known = Isa::fma(Isa::set(t.on_keys[r][c]), u, known);
      out = Isa::fma(Isa::set(t.on_queries[r][c]), u, out);
    }
    const F32 v = load_some(input + int64_t(r) * stride, count);
    const F32 u = Isa::mul(Isa::set(t.beta[r]), Isa::sub(v, known));
    Isa::store(values + token * t.padded, u);
    Isa::store(t.output + r * t.padded + block * kBlock, Isa::fma(Isa::set(t.on_queries[r][token]), u, out));
  }
}

// One block of the matrix takes a run, whose values are these.
template <bool by_channel>
static HYBRID_INLINE void take(float* matrix, const DeltaRun& run, const float* values, int key_dim, int padded) {
  F32 u[kRunTokens];
  for (int c = 0; c < kRunTokens; ++c) {
    u[c] = Isa::load(values + c * padded);
    if (!by_channel) u[c] = Isa::mul(Isa::set(run.decays[1 + c]), u[c]);
  }
  for (int i = 0; i < key_dim; ++i) {
    F32 s = Isa::mul(Isa::set(run.decays[by_channel ? i : 0]), Isa::load(matrix + i * kBlock));
#pragma GCC unroll 8
    for (int c = 0; c < kRunTokens; ++c) s = Isa::fma(Isa::set(run.key[c][i]), u[c], s);
    Isa::store(matrix + i * kBlock, s);
  }
}

// A token comes to a run, of which the matrix and all tokens before it decay.
static HYBRID_INLINE void add_decay(float decay, int token, DeltaRun& run) {
  if (!token) run.decays[0] = 1.0f;
  for (int c = 0; c <= token; ++c) run.decays[c] *= decay;
  run.decays[1 + token] = 1.0f;
}

// What a matrix of one decay takes: the run before, if this one begins, and keys of tokens of earlier steps.
static HYBRID_INLINE void read_kept(const DeltaState& state, RunTokens& t) {
  if (t.begins) __builtin_memcpy(t.last.keys, state.keys, kRunTokens * t.key_dim * sizeof(float));
  for (int c = 0; t.begins && c < kRunTokens; ++c) {
    add_decay(state.decays[c], c, t.last);
    t.last.key[c] = t.last.keys + c * t.key_dim;
  }
  for (int c = 0; c < t.old; ++c) {
    add_decay(state.decays[c], c, t.run);
    t.run.key[c] = state.keys + c * t.key_dim;
  }
}

// Keeps new tokens, once their keys are known.
static HYBRID_INLINE void keep(const float* decays, const DeltaState& state, const RunTokens& t) {
  __builtin_memcpy(state.decays + t.old, decays, t.count * sizeof(float));
  for (int c = t.old; !t.followed && c < t.old + t.count; ++c)
    __builtin_memcpy(state.keys + c * t.key_dim, t.run.key[c], t.key_dim * sizeof(float));
}

// What new tokens find in all blocks of a matrix, which takes what it has to; correct(block) makes their values.
template <bool by_channel, class Tokens, class Correct>
static HYBRID_INLINE void pass_over(const DeltaState& state, Tokens& t, Correct correct) {
  const int blocks = t.padded / kBlock;
  const auto matrix = [&](int block) { return state.matrix + int64_t(block) * t.key_dim * kBlock; };
  for (int first = 0; first < blocks; first += kDeltaBlocks) {
    const int end = min(first + kDeltaBlocks, blocks);
    for (int block = first; t.begins && block < end; ++block)
      take<by_channel>(matrix(block), t.last, state.values + block * kBlock, t.key_dim, t.padded);
    end - first == kDeltaBlocks ? find_all<kDeltaBlocks>(matrix(first), t) : find_all<1>(matrix(first), t);
    for (int block = first; block < end; ++block) {
      correct(block);
      if (t.followed) take<by_channel>(matrix(block), t.run, state.values + block * kBlock, t.key_dim, t.padded);
    }
  }
}

// What new tokens find and correct, once they have been read. input: values of the first of them, `dim` each.
template <bool by_channel>
static HYBRID_KERNEL void delta_tokens(const float* input, int stride, int dim, const DeltaState& state,
                                       DeltaTokens& t) {
  pass_over<by_channel>(state, t, [&](int block) {
    const int at = block * kBlock;
    correct(input + at, stride, block, min(kBlock, dim - at), state.values + at, t);
  });
}

// What new tokens found, normed and weighed: weigh(y, z) by the gates z. gates: of the first token.
template <class Args, class Weigh>
static HYBRID_INLINE void write_rows(const Args& args, int head, const float* gates, int stride, const DeltaTokens& t,
                                     Weigh weigh) {
  const int dim = args.value_dim;
  for (int r = 0; r < t.count; ++r) {
    const float *x = t.output + r * t.padded, *z = gates + int64_t(r) * stride;
    bf16* out = args.output + int64_t(t.row + r) * args.output_stride + head * dim;
    const F32 scale = Isa::set(inverse_rms(x, dim, args.eps));
    for (int i = 0; i < dim; i += kBlock) {
      const int count = min(kBlock, dim - i);
      const F32 y = Isa::mul(Isa::mul(load_some(x + i, count), scale), load_some(args.norm + i, count));
      store_some_bf16(out + i, weigh(y, load_some(z + i, count)), count);
    }
  }
}

// All runs of all heads: compute(head, state) what `t` says.
template <class Args, class Tokens, class Compute>
static HYBRID_INLINE void for_runs(const Args& args, int heads, const DeltaOffsets& at, const Step& step,
                                   const Work& work, Tokens& t, Compute compute) {
  for_each(heads, 1, work, [&](int head) {
    for (int row = 0; row < step.rows; row += t.count) {
      const int sequence = step.sequences[row];
      const auto is_same = [&](int other) {
        return other >= 0 && other < step.rows && step.sequences[other] == sequence;
      };
      float* matrix = reinterpret_cast<float*>(args.state.base + sequence * args.state.sequence_stride) + head * at.end;
      t.row = row;
      t.old = step.positions[row] % kRunTokens;
      t.count = 1;
      while (t.old + t.count < kRunTokens && is_same(row + t.count)) ++t.count;
      t.begins = !t.old && step.positions[row] && !is_same(row - 1);
      t.followed = is_same(row + t.count);
      compute(head, DeltaState{matrix, matrix + at.keys, matrix + at.values, matrix + at.decays});
    }
  });
}

// All rows of all heads. read(head, state, t) keeps new tokens in the state and fills what tokens are read for; values:
// where those of the first head are in a row of the input; gates: those of the first head of the first row.
template <bool by_channel, class Args, class Read, class Weigh>
static HYBRID_INLINE void delta_rule(const Args& args, int heads, int values, const float* gates, int gate_stride,
                                     const Step& step, const Work& work, Read read, Weigh weigh) {
  DeltaTokens t;
  t.key_dim = args.key_dim;
  t.padded = (args.value_dim + kBlock - 1) / kBlock * kBlock;
  const DeltaOffsets at = delta_offsets(args.key_dim, args.value_dim, by_channel);
  for_runs(args, heads, at, step, work, t, [&](int head, const DeltaState& state) {
    read(head, state, t);
    const int first = head * args.value_dim;
    const float* input = args.input + int64_t(t.row) * args.input_stride + values + first;
    delta_tokens<by_channel>(input, args.input_stride, args.value_dim, state, t);
    write_rows(args, head, gates + int64_t(t.row) * gate_stride + first, gate_stride, t, weigh);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
