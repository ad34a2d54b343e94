// What the ops of an indexer work on that selects blocks of keys for each KV head.
#pragma once

#include "executor/attention_args.h"

namespace hybrid {

constexpr int kIndexBlock = kKeys / 2;  // keys that are selected together

// What every block of keys is worth to a head of the indexer: its largest q * k. Of rows that see more than `selects`
// blocks; of others nothing is written.
struct BlockScoresArgs {
  const bf16* q;  // [rows, heads, kv.index_dim]
  float* scores;  // [rows, heads, blocks of the longest sequence of the step, in whole key blocks]
  KvLayout kv;
  int heads, selects;

  template <class Field>
  void fields(Field& field) {
    field("q", q);
    field("scores", scores);
    field("kv", kv);
    field("heads", heads, kPositive);
    field("selects", selects, kPositive);
  }
};

// The blocks that a head of a row sees, ascending: its own and those before it with the largest scores, of equal ones
// the first. Rows of at most `selects` blocks select nothing. Where a score is no number, neither are the row's queries
// afterwards.
struct SelectBlocksArgs {
  const float* scores;  // as those of BlockScoresArgs
  bf16* q;              // [rows, query_stride], of the attention that follows
  int32_t* selected;    // [rows, heads, selects]
  int heads, selects, query_stride;

  template <class Field>
  void fields(Field& field) {
    field("scores", scores);
    field("q", q);
    field("selected", selected);
    field("heads", heads, kPositive);
    field("selects", selects, kPositive);
    field("query_stride", query_stride, kPositive);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_BLOCK_INDEX_OPS(OP)  \
  OP(block_scores, BlockScoresArgs) \
  OP(select_blocks, SelectBlocksArgs)

}  // namespace hybrid
