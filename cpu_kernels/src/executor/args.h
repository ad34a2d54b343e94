// What ops work on, those on rows: embedding, norms, products, sums. Those of attention and of experts have files of
// their own.
#pragma once

#include "executor/rule.h"
#include "executor/step.h"

namespace hybrid {

struct EmbedArgs {
  const char* table;  // packed [vocab, hidden]
  float* output;
  int hidden, pairs, output_stride;
  float scale = 1.0f;

  template <class Field>
  void fields(Field& field) {
    field("table", table);
    field("output", output);
    field("hidden", hidden);
    field("pairs", pairs);
    field("output_stride", output_stride);
    field("scale", scale, kOptional);
  }
};

struct RopeTableArgs {
  const float* inverse_frequencies;  // [dim / 2]
  float* table;                      // [rows, dim]: cosines, then sines
  int dim;
  float factor;
  const float* long_frequencies;  // null, or those of rows whose sequence has more than `long_above` tokens
  const int32_t* lengths;         // [rows], of the sequence of each row; null without long_frequencies
  int long_above;
  float long_factor = 1.0f;
  int every = 1;  // angles are those of the last position that is a multiple of it

  template <class Field>
  void fields(Field& field) {
    field("inverse_frequencies", inverse_frequencies);
    field("table", table);
    field("dim", dim);
    field("factor", factor);
    field("long_frequencies", long_frequencies, kOptional);
    field("lengths", lengths, kOptional);
    field("long_above", long_above, kOptional);
    field("long_factor", long_factor, kOptional);
    field("every", every, Rule{true, true, 1, 1});
  }
};

struct NormArgs {
  const float* input;
  const float* weight;
  bf16* output;       // null unless a matrix of the float kind reads it
  float* output_f32;  // null unless a router reads it
  char* output8;      // int8 activation rows; null unless a matrix of the integer kind reads them
  int width, input_stride, output_stride;
  int64_t output8_stride;  // bytes
  float eps;
  bool logit_rows;                // only the rows whose logits are wanted, gathered
  bool centred;                   // the mean of a row is taken from it first
  const float* bias;              // null, or [width]
  bool accumulate;                // add to output_f32
  float* cleared;                 // null, or rows as those of output_f32 that become zero, for what follows to add to
  char* output_grouped;           // null, or grouped activation rows, which formats of codes in groups read
  int64_t output_grouped_stride;  // bytes
  char* output_wide;              // null, or wide activation rows, which formats of fp4 codes read
  int64_t output_wide_stride;     // bytes
  const float* factor;            // null, or [1]: what output_f32 holds in the end is multiplied by it

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("weight", weight);
    field("output", output, kNullable);
    field("output_f32", output_f32, kNullable);
    field("output8", output8, kNullable);
    field("width", width);
    field("input_stride", input_stride);
    field("output_stride", output_stride);
    field("output8_stride", output8_stride);
    field("eps", eps);
    field("logit_rows", logit_rows);
    field("centred", centred, kOptional);
    field("bias", bias, kOptional);
    field("accumulate", accumulate, kOptional);
    field("cleared", cleared, kOptional);
    field("output_grouped", output_grouped, kOptional);
    field("output_grouped_stride", output_grouped_stride, kOptional);
    field("output_wide", output_wide, kOptional);
    field("output_wide_stride", output_wide_stride, kOptional);
    field("factor", factor, kOptional);
  }
};

// bf16 rows to activation rows of whole numbers.
struct QuantiseArgs {
  const bf16* input;
  char* output;
  int width;                            // inputs, padded
  int64_t input_stride, output_stride;  // bytes
  int multiple;                         // rows of input for each row of the step
  bool grouped;                         // grouped activation rows, which formats of codes in groups read
  bool wide;                            // wide ones, which formats of fp4 codes read

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("output", output);
    field("width", width, kPadded);
    field("input_stride", input_stride);
    field("output_stride", output_stride);
    field("multiple", multiple, kPositive);
    field("grouped", grouped, kOptional);
    field("wide", wide, kOptional);
  }
};

struct GemmArgs {
  Format format;
  const char* input;  // rows of bf16, or int8 activation rows for a format of the integer kind
  const char* weight;
  const float* bias;     // null, or [columns]
  float* output;         // null: the step's logits
  int columns, inputs;   // inputs: padded
  int64_t input_stride;  // bytes
  int output_stride;
  bool accumulate;     // add to output
  int first_column;    // of the logits, where a node's part of them begins
  float scale = 1.0f;  // of the product and its bias

  template <class Field>
  void fields(Field& field) {
    field("format", format);
    field("input", input);
    field("weight", weight, kLines);
    field("bias", bias, kNullable);
    field("output", output, kNullable);
    field("columns", columns);
    field("inputs", inputs, kPadded);
    field("input_stride", input_stride);
    field("output_stride", output_stride);
    field("accumulate", accumulate);
    field("first_column", first_column, kOptional);
    field("scale", scale, kOptional);
  }
};

// A small matrix for each head, which multiplies that head's part of every row. Matrices [columns, inputs] lie behind
// each other, each of whole blocks and `weight_head_stride` bytes.
struct HeadGemmArgs {
  Format format;
  const char* input;  // as that of GemmArgs, a row for each head
  const char* weight;
  bf16* output;
  int heads, columns, inputs;
  int64_t input_stride, input_head_stride, weight_head_stride;  // bytes
  int output_stride, output_head_stride;

  template <class Field>
  void fields(Field& field) {
    field("format", format);
    field("input", input);
    field("weight", weight, kLines);
    field("output", output);
    field("heads", heads, kPositive);
    field("columns", columns, kPositive);
    field("inputs", inputs, kPadded);
    field("input_stride", input_stride);
    field("input_head_stride", input_head_stride);
    field("weight_head_stride", weight_head_stride, kLines);
    field("output_stride", output_stride);
    field("output_head_stride", output_head_stride);
  }
};

// Bounds the step's logits: cap * tanh(logit / cap).
struct SoftCapArgs {
  int columns;  // of the logits
  float cap;

  template <class Field>
  void fields(Field& field) {
    field("columns", columns, kPositive);
    field("cap", cap);
  }
};

// A buffer of each memory node.
struct NodeBuffers {
  float* of[kMaxNodes];
  int count;
};

// Adds what every node summed to the output, in ascending order of nodes, and clears it for the next layer.
struct JoinArgs {
  NodeBuffers partials;  // rows laid out as those of the output
  float* output;
  int width, output_stride;

  template <class Field>
  void fields(Field& field) {
    field("partials", partials);
    field("output", output);
    field("width", width);
    field("output_stride", output_stride);
  }
};

// Calls back into the program that made the plan, on the thread that runs the step. false: it failed, the step ends.
struct HostArgs {
  bool (*call)(void* context);
  void* context;
};

// Those of which every instruction set has a kernel, see executor/ops.h.
#define HYBRID_ROW_OPS(OP)    \
  OP(embed, EmbedArgs)        \
  OP(norm, NormArgs)          \
  OP(quantise, QuantiseArgs)  \
  OP(gemm, GemmArgs)          \
  OP(head_gemm, HeadGemmArgs) \
  OP(soft_cap, SoftCapArgs)   \
  OP(join, JoinArgs)

}  // namespace hybrid
