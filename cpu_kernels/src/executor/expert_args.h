// What the ops of experts work on.
#pragma once

#include "executor/rule.h"
#include "executor/step.h"

namespace hybrid {

struct RouterArgs {
  const float* input;
  const float* weight;  // [experts, hidden]
  const float* bias;    // null, or [experts]
  float* logits;        // [rows, experts]
  int experts, hidden, input_stride;

  template <class Field>
  void fields(Field& field) {
    field("input", input);
    field("weight", weight);
    field("bias", bias, kNullable);
    field("logits", logits);
    field("experts", experts, kPositive);
    field("hidden", hidden);
    field("input_stride", input_stride);
  }
};

struct TopkArgs {
  const float* logits;    // [rows, experts], or with a gate [rows, experts + 1]: that of the shared expert behind them
  int32_t* ids;           // [rows, top_k], in order of falling score
  float* weights;         // [rows, top_k]
  float* shared_weights;  // null: no gate; or [rows], the sigmoid of the gate
  int experts, top_k;
  bool renormalise;
  Scoring scoring;
  float scale;
  const float* correction;  // null, or [experts]: added to scores when experts are chosen, not when they are weighed
  int groups, top_groups;   // 0: none; else equal groups of experts, and how many of them are chosen among
  float jitter = 0.0f;  // of sparsemixer: how far from the largest logit, relative to their size, half of "close" is
  const float* expert_scales;  // null, or [experts]: weights of an expert are multiplied by its own, last of all
  float logit_cap;             // 0: none; else logits of experts are kept between it and less itself, first of all
  const float* by_token;       // null, or [vocab, top_k]: the experts of every token, which logits only weigh

  template <class Field>
  void fields(Field& field) {
    field("logits", logits);
    field("ids", ids);
    field("weights", weights);
    field("experts", experts, kPositive);
    field("top_k", top_k, kPositive);
    field("renormalise", renormalise);
    field("scoring", scoring);
    field("scale", scale);
    field("shared_weights", shared_weights, kOptional);
    field("correction", correction, kOptional);
    field("groups", groups, kOptional);
    field("top_groups", top_groups, kOptional);
    field("jitter", jitter, kOptional);
    field("expert_scales", expert_scales, kOptional);
    field("logit_cap", logit_cap, kOptional);
    field("by_token", by_token, kOptional);
  }
};

// Which rows go to which expert, rebuilt at every MoE layer.
struct Routing {
  int32_t* offsets;  // [experts + 1], into rows and weights
  int32_t* rows;     // [rows * top_k], sorted by expert, then by row
  float* weights;    // [rows * top_k]
  int32_t* active;   // [experts], those with at least one row, ascending
  int32_t* count;    // [1], how many are active

  template <class Field>
  void fields(Field& field) {
    field("offsets", offsets);
    field("rows", rows);
    field("weights", weights);
    field("active", active);
    field("count", count);
  }
};

struct GroupArgs {
  const int32_t* ids;    // null: one expert takes every row; a negative id is computed elsewhere and left out
  const float* weights;  // null: all are `weight`
  Routing routing;
  int32_t* pairs;  // null, or [rows * top_k]: beside every entry of `routing` its place in ids
  int experts, top_k;
  float weight;  // 0: 1

  template <class Field>
  void fields(Field& field) {
    field("ids", ids, kNullable);
    field("weights", weights, kNullable);
    field("routing", routing);
    field("experts", experts, kPositive);
    field("top_k", top_k, kPositive);
    field("pairs", pairs, kOptional);
    field("weight", weight, kOptional);
  }
};

// One matrix of every expert of a set, all of one size, and the rows that it multiplies.
struct ExpertSet {
  Format format;
  const char* input;     // as that of GemmArgs
  int64_t input_stride;  // bytes
  Routing routing;
  const char* experts;    // null: there is no such set
  const float* bias;      // null, or values for each expert
  int64_t expert_stride;  // bytes
  int blocks, inputs;

  template <class Field>
  void fields(Field& field) {
    field("format", format);
    field("input", input);
    field("input_stride", input_stride);
    field("routing", routing);
    field("experts", experts, kLines);
    field("bias", bias, kNullable);
    field("expert_stride", expert_stride, kLines);
    field("blocks", blocks, kPositive);
    field("inputs", inputs, kPadded);
  }
};

// Gate and up of the routed experts and of the expert that all rows share, which may differ in format and size. With an
// activation that has no gate, up alone.
struct GateUpArgs {
  ExpertSet routed, shared;  // biases: [experts][blocks][gate, up][16]
  bf16* output;              // [rows * top_k, output_stride], in routing order
  bf16* shared_output;       // [rows, shared_output_stride]
  int output_stride, shared_output_stride;
  Activation activation;
  float bound, shared_bound;  // 0: none; else what silu makes of gates is at most it, and up within it; silu alone

  template <class Field>
  void fields(Field& field) {
    routed.fields(field);
    field("output", output);
    field("output_stride", output_stride);
    field("activation", activation);
    field("shared", shared, kOptional);
    field("shared_output", shared_output, kOptional);
    field("shared_output_stride", shared_output_stride, kOptional);
    field("bound", bound, kOptional);
    field("shared_bound", shared_bound, kOptional);
  }
};

// The down matrices of the same; their input rows are in routing order.
struct DownArgs {
  ExpertSet routed, shared;  // from the first down matrix on; biases: [experts][blocks * 16]
  float* output;             // added to
  int output_stride;

  template <class Field>
  void fields(Field& field) {
    routed.fields(field);
    field("output", output);
    field("output_stride", output_stride);
    field("shared", shared, kOptional);
  }
};

// Adds what every expert made of a row to it, weighted, in ascending order of experts, as DownArgs does with experts
// that are all at one place. Leaves the contributions cleared.
struct CombineArgs {
  const int32_t* ids;  // [rows, top_k]
  const float* weights;
  float* contributions;  // [rows * top_k, stride], in the order of ids
  float* output;
  int top_k, width, stride, output_stride;

  template <class Field>
  void fields(Field& field) {
    field("ids", ids);
    field("weights", weights);
    field("contributions", contributions);
    field("output", output);
    field("top_k", top_k, kPositive);
    field("width", width);
    field("stride", stride);
    field("output_stride", output_stride);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_EXPERT_OPS(OP) \
  OP(router, RouterArgs)      \
  OP(topk, TopkArgs)          \
  OP(gate_up, GateUpArgs)     \
  OP(down, DownArgs)          \
  OP(combine, CombineArgs)

}  // namespace hybrid
