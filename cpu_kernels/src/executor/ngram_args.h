// What the ops work on that add to the streams of a residual what a table says of a token and those before it.
#pragma once

#include "executor/state_args.h"

namespace hybrid {

constexpr int kMaxNgram = 8;  // tokens

// Rows of a table by which each row of the step looks up its n-grams, of 2 up to `size` tokens, each in `heads` parts
// of the table: the exclusive or of tokens times their factors, modulo the rows of the part. Of a token before the
// beginning of the sequence, or before the end of an earlier text, that end stands in its place.
struct NgramArgs {
  const int64_t* hash;  // [size] factors, the newest token's first; [parts] rows of each part, [parts] its first row
  int32_t* ids;         // [rows, (size - 1) * heads]
  StateLayout state;    // of each sequence int32 [kept_tokens(size)]: its last tokens
  int size, heads;
  int end;  // the token that ends a text

  template <class Field>
  void fields(Field& field) {
    field("hash", hash);
    field("ids", ids);
    field("state", state);
    field("size", size, Rule{false, false, 2, 1});
    field("heads", heads, kPositive);
    field("end", end);
  }
};

// Rows of a table side by side.
struct LookupArgs {
  const bf16* table;   // [.., dim]
  const int32_t* ids;  // [rows, count]
  bf16* output;        // [rows, output_stride]
  int dim, count, output_stride;

  template <class Field>
  void fields(Field& field) {
    field("table", table);
    field("ids", ids);
    field("output", output);
    field("dim", dim, kPositive);
    field("count", count, kPositive);
    field("output_stride", output_stride);
  }
};

// How much of the value of a row each stream takes: the sigmoid of the signed root of key * stream / sqrt(width), both
// normed; and that divided by the root of the mean square of what the stream takes.
struct NgramGateArgs {
  const float* projected;  // [rows, projected_stride]: keys of all streams, then the value
  const float* streams;    // [rows, stream_stride]
  const float* key_norm;   // [count * width]
  const float* query_norm;
  float* gates;  // [rows, 2 * count]
  int count, width, projected_stride, stream_stride;
  float eps;

  template <class Field>
  void fields(Field& field) {
    field("projected", projected);
    field("streams", streams);
    field("key_norm", key_norm);
    field("query_norm", query_norm);
    field("gates", gates);
    field("count", count, kPositive);
    field("width", width, kPositive);
    field("projected_stride", projected_stride);
    field("stream_stride", stream_stride);
    field("eps", eps);
  }
};

// What streams take: their share of the value, and silu of a causal convolution of that, normed, over every
// `dilation`-th token.
struct NgramConvArgs {
  const float* values;  // [rows, value_stride]
  const float* gates;   // as those of NgramGateArgs
  const float* norm;    // [width]
  const float* weight;  // [width, taps], the newest token last
  float* streams;       // [rows, stream_stride], to which it is added
  StateLayout state;    // of each sequence float32 [kept_tokens(taps, dilation), width]: what its last tokens brought
  int count, width;     // width: of all streams together
  int taps, dilation, value_stride, stream_stride;

  template <class Field>
  void fields(Field& field) {
    field("values", values);
    field("gates", gates);
    field("norm", norm);
    field("weight", weight);
    field("streams", streams);
    field("state", state);
    field("count", count, kPositive);
    field("width", width, kPositive);
    field("taps", taps, kPositive);
    field("dilation", dilation, kPositive);
    field("value_stride", value_stride);
    field("stream_stride", stream_stride);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_NGRAM_OPS(OP)    \
  OP(ngrams, NgramArgs)         \
  OP(lookup, LookupArgs)        \
  OP(ngram_gate, NgramGateArgs) \
  OP(ngram_conv, NgramConvArgs)

}  // namespace hybrid
