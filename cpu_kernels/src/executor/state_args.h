// What the ops of mixers work on that keep a state of one size for a sequence, instead of keys and values.
#pragma once

#include "executor/rule.h"

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

constexpr int kMaxTaps = 8;

// A causal convolution over the tokens of a sequence, each channel by itself, between two gates:
// out = c * sum over j of weight[j] * (b * x)[j tokens before the newest of `taps`].
struct ShortConvArgs {
  const float* input;   // [rows, input_stride]: b, c and x of `width` channels each
  const float* weight;  // [width, taps], the newest token last
  const float* bias;    // null, or [width]
  bf16* output;
  StateLayout state;  // of each sequence float32 [taps - 1, width]: b * x of its last tokens, the newest last
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

// As HYBRID_ROW_OPS.
#define HYBRID_STATE_OPS(OP) OP(short_conv, ShortConvArgs)

}  // namespace hybrid
