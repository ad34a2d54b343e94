// What the ops work on of a residual stream that is several streams (hyper-connections): each half of a layer reads a
// weighted sum of them, and its result is spread over a mixture of them.
#pragma once

#include "executor/rule.h"
#include "executor/step.h"

namespace hybrid {

constexpr int kMaxStreams = 8;

// The sum of the streams that a half reads, and the weights by which its result is spread. Each weight is made of a
// product with all streams, divided by the root of their mean square, times a scale, plus a base. Those of the sum,
// `pre`, are sigmoids, `post` are twice those. `comb` is a softmax of each of its rows; then its columns and its rows
// are made to sum to 1 in turn, columns first and last. Where there are no products, the sum is the mean. Of streams
// that have gates, each is normed first, and every element multiplied by the sigmoid of its gate.
struct CollapseArgs {
  const float* streams;   // [rows, stream_stride]: `count` streams of `width` floats
  const float* products;  // [rows, (2 + count) * count]: for pre, post and comb; if weights are null [rows, count]
  const float* base;      // one for each product of a row; null where products are
  const float* scale;     // of pre, post and comb; if weights are null of pre alone; null where products are
  float* output;          // [rows, output_stride]
  float* weights;         // null, or [rows, (1 + count) * count]: post and comb
  float* cleared;         // null, or rows as those of output that become zero, for what follows to add to
  int count, width, stream_stride, output_stride;
  int rounds;   // in which columns are made to sum to 1; 0: there is no comb, among the products, scales and weights
                // either
  float eps;    // of the root
  float floor;  // what is added to pre, to comb and to each of its sums; to post where there is no comb
  float magnitude;     // of post, in place of 2; 0: 2
  const float* norm;   // null, or [count * width]: of each stream by itself
  const float* gates;  // null without a norm, or [rows, gate_stride]
  int gate_stride;

  template <class Field>
  void fields(Field& field) {
    field("streams", streams);
    field("products", products, kNullable);
    field("base", base, kNullable);
    field("scale", scale, kNullable);
    field("output", output);
    field("weights", weights, kNullable);
    field("cleared", cleared, kNullable);
    field("count", count, kPositive);
    field("width", width, kPositive);
    field("stream_stride", stream_stride);
    field("output_stride", output_stride);
    field("rounds", rounds);
    field("eps", eps);
    field("floor", floor);
    field("magnitude", magnitude, kOptional);
    field("norm", norm, kOptional);
    field("gates", gates, kOptional);
    field("gate_stride", gate_stride, kOptional);
  }
};

// Between the two products that make gates for `collapse`: silu of the first; and weights for `expand` without a comb,
// twice the sigmoid of a product each. All products are divided by the number of streams before.
struct StreamGatesArgs {
  const float* low;  // [rows, low_stride]: `rank` products; if there are weights, `count` more
  bf16* output;      // [rows, output_stride]
  float* weights;    // null, or [rows, count]
  int count, rank, low_stride, output_stride;

  template <class Field>
  void fields(Field& field) {
    field("low", low);
    field("output", output);
    field("weights", weights, kNullable);
    field("count", count, kPositive);
    field("rank", rank, kPositive);
    field("low_stride", low_stride);
    field("output_stride", output_stride);
  }
};

// Stream k becomes post[k] * input + sum over j of comb[j, k] * stream j; without weights, the input. Where there is no
// comb, post[k] * input + stream k.
struct ExpandArgs {
  const float* input;    // [rows, input_stride]
  const float* weights;  // null, or as those of CollapseArgs
  float* streams;        // as those of CollapseArgs
  int count, width, input_stride, stream_stride;
  bool unmixed;  // there is no comb

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("weights", weights, kNullable);
    field("streams", streams);
    field("count", count, kPositive);
    field("width", width, kPositive);
    field("input_stride", input_stride);
    field("stream_stride", stream_stride);
    field("unmixed", unmixed, kOptional);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_STREAM_OPS(OP)       \
  OP(collapse, CollapseArgs)        \
  OP(stream_gates, StreamGatesArgs) \
  OP(expand, ExpandArgs)

}  // namespace hybrid
