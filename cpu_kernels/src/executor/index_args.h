// What the ops of an indexer work on, which selects the tokens that attention sees of a long sequence.
#pragma once

#include "executor/attention_args.h"

namespace hybrid {

// Behind the indexer's projections: keys are normed, and queries if they have a norm; both are turned, a key goes into
// the arena.
struct IndexArgs {
  const float* queries;    // [rows, query_stride]: of each head head_dim dimensions, of which the first rope_dim turn
  const float* keys;       // [rows, key_stride]: the same of the one key of all heads
  const float* rope;       // [rows, rope_dim]
  const float* norm;       // [head_dim]
  const float* norm_bias;  // [head_dim]; null: the norm has no mean and no bias
  bf16* q;                 // [rows, heads, kv.index_dim]
  KvLayout kv;
  int heads, head_dim, rope_dim;
  bool interleaved;
  int query_stride, key_stride;
  float eps;
  const float* query_norm;  // null, or [head_dim]: of each head, without a mean

  template <class Field>
  void fields(Field& field) {
    field("queries", queries);
    field("keys", keys);
    field("rope", rope);
    field("norm", norm);
    field("norm_bias", norm_bias, kNullable);
    field("q", q);
    field("kv", kv);
    field("heads", heads, kPositive);
    field("head_dim", head_dim, kPositive);
    field("rope_dim", rope_dim);
    field("interleaved", interleaved);
    field("query_stride", query_stride);
    field("key_stride", key_stride);
    field("eps", eps);
    field("query_norm", query_norm, kOptional);
  }
};

// What every token is worth to a row of more than `selects` tokens: over all heads, weight * max(0, q * k).
struct IndexScoresArgs {
  const bf16* q;         // [rows, heads, kv.index_dim]
  const float* weights;  // [rows, heads]
  float* scores;         // [rows, tokens of the longest sequence of the step, in whole key blocks]
  KvLayout kv;
  int heads, selects;

  template <class Field>
  void fields(Field& field) {
    field("q", q);
    field("weights", weights);
    field("scores", scores);
    field("kv", kv);
    field("heads", heads, kPositive);
    field("selects", selects, kPositive);
  }
};

// The positions of the largest scores of a row, ascending; of equal scores those of the first tokens. Rows of at most
// `selects` tokens select nothing. Where a score is no number, neither are the row's queries afterwards.
struct SelectArgs {
  const float* scores;  // as those of IndexScoresArgs
  bf16* q;              // [rows, query_stride], of the attention that follows
  int32_t* selected;    // [rows, selects]
  int selects, query_stride;

  template <class Field>
  void fields(Field& field) {
    field("scores", scores);
    field("q", q);
    field("selected", selected);
    field("selects", selects, kPositive);
    field("query_stride", query_stride, kPositive);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_INDEX_OPS(OP)        \
  OP(index, IndexArgs)              \
  OP(index_scores, IndexScoresArgs) \
  OP(select, SelectArgs)

}  // namespace hybrid
