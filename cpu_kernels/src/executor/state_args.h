// What the ops of mixers work on that keep a state of one size for a sequence, instead of keys and values.
#pragma once

#include "executor/rule.h"
#include "executor/step.h"

namespace hybrid {

// The state of a layer: that of sequence s is at base + s * sequence_stride, zero before its first token.
struct StateLayout {
  char* base;
  int64_t sequence_stride;

  template <class Field>
  void fields(Field& field) {
    field("base", base, kLines);
    field("sequence_stride", sequence_stride, kLines);
  }
};

// Tokens of a run, the first at a multiple of their number. A state holds what it was when the run of its newest token
// began, and what those of the run have brought: so a sequence may go back to any token of that run but the first, as
// if what came after it never had.
constexpr int kRunTokens = 8;
constexpr int kMaxTaps = 8;

// Tokens whose inputs a convolution keeps, each at its position modulo their number: those that the first token of a
// run sees, and the run. dilation: it sees every dilation-th.
static inline int kept_tokens(int taps, int dilation = 1) { return (taps - 1) * dilation + kRunTokens - 1; }

static inline int64_t conv_state_bytes(int width, int taps, int dilation = 1) {
  return int64_t(kept_tokens(taps, dilation)) * width * int64_t(sizeof(float));
}

static inline int64_t ngram_state_bytes(int size) { return int64_t(kept_tokens(size)) * int64_t(sizeof(int32_t)); }

// A causal convolution over the tokens of a sequence, each channel by itself, between two gates:
// out = c * sum over j of weight[j] * (b * x)[j tokens before the newest of `taps`].
struct ShortConvArgs {
  const float* input;   // [rows, input_stride]: b, c and x of `width` channels each
  const float* weight;  // [width, taps], the newest token last
  const float* bias;    // null, or [width]
  bf16* output;
  StateLayout state;  // of each sequence float32 [kept_tokens, width]: b * x of its last tokens
  int width, taps, input_stride, output_stride;

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("weight", weight);
    field("bias", bias, kNullable);
    field("output", output);
    field("state", state);
    field("width", width, kPositive);
    field("taps", taps, kPositive);
    field("input_stride", input_stride);
    field("output_stride", output_stride);
  }
};

// The same convolution without gates, in place, with silu behind it.
struct SiluConvArgs {
  float* values;        // [rows, stride], the first `width` of each row
  const float* weight;  // [width, taps], the newest token last
  StateLayout state;    // of each sequence float32 [kept_tokens, width]: what its last tokens brought
  int width, taps, stride;
  const float* bias;  // null, or [width]

  template <class Field>
  void fields(Field& field) {
    field("values", values);
    field("weight", weight);
    field("state", state);
    field("width", width, kPositive);
    field("taps", taps, kPositive);
    field("stride", stride);
    field("bias", bias, kOptional);
  }
};

constexpr int kMaxDeltaDim = 256;  // dimensions of keys and of values in the delta rule

// Where things are in the state of a value head of the delta rule, in floats. The matrix is at its start: of each 16
// values [key_dim, 16]. Of the tokens of a run, which is not yet written into it, there are keys [kRunTokens, key_dim],
// values [kRunTokens, whole blocks] and by what each made all before it decay: [kRunTokens], or where channels decay by
// themselves [kRunTokens, key_dim].
struct DeltaOffsets {
  int64_t keys, values, decays, end;
};

static inline DeltaOffsets delta_offsets(int key_dim, int value_dim, bool by_channel) {
  const int64_t padded = (int64_t(value_dim) + kBlock - 1) / kBlock * kBlock;
  DeltaOffsets at{};
  at.keys = padded * key_dim;
  at.values = at.keys + (int64_t(kRunTokens) * key_dim + kBlock - 1) / kBlock * kBlock;
  at.decays = at.values + kRunTokens * padded;
  at.end = at.decays + (int64_t(kRunTokens) * (by_channel ? key_dim : 1) + kBlock - 1) / kBlock * kBlock;
  return at;
}

static inline int64_t delta_state_bytes(int value_heads, int key_dim, int value_dim, bool by_channel) {
  return value_heads * delta_offsets(key_dim, value_dim, by_channel).end * int64_t(sizeof(float));
}

// The gated delta rule: every value head has a matrix S that each token multiplies by a decay and then corrects, so
// that its key k finds more of its value v there: S += k (beta (v - S^T k))^T. What its query q finds, S^T q, is normed
// and gated. Keys and queries are normed; a key head serves several value heads.
struct GatedDeltaArgs {
  const float* input;       // [rows, input_stride]: queries and keys of all key heads, values and gates of value heads
  const float* decays;      // [rows, decay_stride]: of each value head what makes beta; then what makes the decay
  const float* decay_rate;  // [value_heads], its logarithm
  const float* decay_bias;  // [value_heads]
  const float* norm;        // [value_dim]
  bf16* output;             // [rows, output_stride]
  StateLayout state;        // of each sequence, of each value head: see DeltaOffsets
  int key_heads, value_heads, key_dim, value_dim, input_stride, decay_stride, output_stride;
  float eps;
  bool in_turn;      // the value heads of a key head are as many apart as there are key heads, not adjacent
  bool sigmoid;      // of gates, in place of silu
  float beta_scale;  // of beta, which is a sigmoid; 0: 1

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("decays", decays);
    field("decay_rate", decay_rate);
    field("decay_bias", decay_bias);
    field("norm", norm);
    field("output", output);
    field("state", state);
    field("key_heads", key_heads, kPositive);
    field("value_heads", value_heads, kPositive);
    field("key_dim", key_dim, kPositive);
    field("value_dim", value_dim, kPositive);
    field("input_stride", input_stride);
    field("decay_stride", decay_stride);
    field("output_stride", output_stride);
    field("eps", eps);
    field("in_turn", in_turn, kOptional);
    field("sigmoid", sigmoid, kOptional);
    field("beta_scale", beta_scale, kOptional);
  }
};

// Kimi Delta Attention: the same with a decay for each channel of keys, keys and queries of every head, and what a
// query finds weighed by the sigmoid of a gate.
struct KimiDeltaArgs {
  const float* input;       // [rows, input_stride]: queries, keys and values of all heads
  const float* decays;      // [rows, decay_stride]: of each channel of each head what makes its decay
  const float* betas;       // [rows, beta_stride]: of each head what makes beta
  const float* gates;       // [rows, gate_stride]: of each value
  const float* decay_rate;  // [heads], its logarithm
  const float* decay_bias;  // [heads, key_dim]
  const float* norm;        // [value_dim]
  bf16* output;             // [rows, output_stride]
  StateLayout state;        // of each sequence, of each head: see DeltaOffsets
  int heads, key_dim, value_dim, input_stride, decay_stride, beta_stride, gate_stride, output_stride;
  float eps;
  float lower_bound;  // of logarithms of decays, which then are made by a sigmoid; 0: none, and softplus makes them

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("decays", decays);
    field("betas", betas);
    field("gates", gates);
    field("decay_rate", decay_rate);
    field("decay_bias", decay_bias);
    field("norm", norm);
    field("output", output);
    field("state", state);
    field("heads", heads, kPositive);
    field("key_dim", key_dim, kPositive);
    field("value_dim", value_dim, kPositive);
    field("input_stride", input_stride);
    field("decay_stride", decay_stride);
    field("beta_stride", beta_stride);
    field("gate_stride", gate_stride);
    field("output_stride", output_stride);
    field("eps", eps);
    field("lower_bound", lower_bound, kOptional);
  }
};

// The state space of Mamba-2: every head has a matrix S that each token multiplies by a decay, exp(-rate dt), and to
// which it adds dt x B^T. What comes out, S C + skip x, is gated by silu(z), and replaces x. dt is softplus of a step
// and its bias, kept within bounds; several adjacent heads share the B and C of a group.
struct StateSpaceArgs {
  float* values;       // [rows, stride]: x of all heads, B and then C of all groups, z of all heads
  const float* steps;  // [rows, step_stride]: one for each head
  const float* bias;   // [heads], of steps
  const float* rate;   // [heads], its logarithm
  const float* skip;   // [heads]
  StateLayout state;   // of each sequence, of each head: see DeltaOffsets, with B for keys and dt x for values
  int heads, groups, head_dim, state_dim, stride, step_stride;
  float smallest, largest;  // bounds of dt

  template <class Field>
  void fields(Field& field) {
    field("values", values);
    field("steps", steps);
    field("bias", bias);
    field("rate", rate);
    field("skip", skip);
    field("state", state);
    field("heads", heads, kPositive);
    field("groups", groups, kPositive);
    field("head_dim", head_dim, kPositive);
    field("state_dim", state_dim, kPositive);
    field("stride", stride);
    field("step_stride", step_stride);
    field("smallest", smallest);
    field("largest", largest);
  }
};

// RMSNorm of each of several adjacent groups of a row.
struct GroupNormArgs {
  const float* input;   // [rows, input_stride]
  const float* weight;  // [width]
  bf16* output;         // [rows, output_stride]
  int width, groups, input_stride, output_stride;
  float eps;

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("weight", weight);
    field("output", output);
    field("width", width, kPositive);
    field("groups", groups, kPositive);
    field("input_stride", input_stride);
    field("output_stride", output_stride);
    field("eps", eps);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_STATE_OPS(OP)      \
  OP(short_conv, ShortConvArgs)   \
  OP(silu_conv, SiluConvArgs)     \
  OP(gated_delta, GatedDeltaArgs) \
  OP(kimi_delta, KimiDeltaArgs)   \
  OP(state_space, StateSpaceArgs) \
  OP(group_norm, GroupNormArgs)

}  // namespace hybrid
