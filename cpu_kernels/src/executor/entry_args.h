// What the ops of compressed attention work on: one head of keys that are values too, and entries, each of which stands
// for several tokens. A row sees the last tokens, and entries of those before.
#pragma once

#include "executor/attention_args.h"

namespace hybrid {

constexpr int kMaxCompressed = 256;  // tokens of which one entry is made

// Heads of which some dimensions turn: queries to bf16, and the one key of a token, normed, as entries lie.
struct TurnArgs {
  const float* queries;  // [rows, query_stride]
  const float* keys;     // null, or [rows, key_stride]
  const float* rope;     // [rows, rope_dim]; null where nothing turns
  const float* norm;     // null, or of keys [head_dim]
  bf16* q;               // [rows, heads, padded_dim], padded with zeros
  char* made;            // null without keys, or [rows, kv.entry_bytes]
  KvLayout kv;           // of keys
  int heads, head_dim, padded_dim, rope_dim;
  bool interleaved;
  bool normed;  // queries are normed, without a weight
  int query_stride, key_stride;
  float eps;
  const float* query_norm;  // null, or [head_dim]: queries are normed with a weight
  bool turns_first;         // the first rope_dim dimensions turn, not the last

  template <class Field>
  void fields(Field& field) {
    field("queries", queries);
    field("keys", keys, kNullable);
    field("rope", rope, kNullable);
    field("norm", norm, kNullable);
    field("q", q);
    field("made", made, kNullable);
    field("kv", kv);
    field("heads", heads, kPositive);
    field("head_dim", head_dim, kPositive);
    field("padded_dim", padded_dim);
    field("rope_dim", rope_dim);
    field("interleaved", interleaved);
    field("normed", normed);
    field("query_stride", query_stride);
    field("key_stride", key_stride);
    field("eps", eps);
    field("query_norm", query_norm, kOptional);
    field("turns_first", turns_first, kOptional);
  }
};

// Turns back what attention made of values that had turned as keys, by the angles of the row.
struct UnturnArgs {
  bf16* values;       // [rows, stride], changed in place
  const float* rope;  // [rows, rope_dim]
  int heads, head_dim, rope_dim;
  bool interleaved;
  int stride;

  template <class Field>
  void fields(Field& field) {
    field("values", values);
    field("rope", rope);
    field("heads", heads, kPositive);
    field("head_dim", head_dim, kPositive);
    field("rope_dim", rope_dim);
    field("interleaved", interleaved);
    field("stride", stride);
  }
};

// The row that ends a window of `rate` tokens makes its entry: in each dimension a mean of what tokens brought,
// weighted by a softmax of their gates; normed, and turned as the first token of the window. With `overlaps` a token
// brings two sets of dimensions: the first is for the entry of the next window, the second for that of its own.
struct CompressArgs {
  const float* made;  // [rows, width]: what a token brings, from `first_value` on, and its gates, from `first_gate` on
  const float* bias;  // [rate, sets, dim], of gates; null: there are none, and the mean is plain
  const float* norm;  // [dim]; null: entries are not normed
  const float* rope;  // [rows, rope_dim]; null where nothing turns
  KvLayout kv;        // entries go to kv.entry_offset; older tokens are at kv.tail_offset, see KeepArgs
  bool indexes;       // entries are keys of an indexer instead: bf16 [tokens / rate, kv.index_dim] at kv.index_offset
  int dim, rope_dim, rate;
  bool overlaps, interleaved;
  int first_value, first_gate, width;
  int tokens;  // that are kept
  float eps;
  bool turns_first;  // the first rope_dim dimensions turn, not the last

  template <class Field>
  void fields(Field& field) {
    field("made", made);
    field("bias", bias, kNullable);
    field("norm", norm, kNullable);
    field("rope", rope, kNullable);
    field("kv", kv);
    field("indexes", indexes);
    field("dim", dim, kPositive);
    field("rope_dim", rope_dim);
    field("rate", rate, kPositive);
    field("overlaps", overlaps);
    field("interleaved", interleaved);
    field("first_value", first_value);
    field("first_gate", first_gate);
    field("width", width);
    field("tokens", tokens);
    field("eps", eps);
    field("turns_first", turns_first, kOptional);
  }
};

// The last `tokens` rows of each sequence are kept for the next step, each at its position modulo `tokens`.
struct KeepArgs {
  const char* made;  // float32 [rows, width]; of width 0 keys [rows, kv.entry_bytes]
  KvLayout kv;       // kv.tail_offset: to float32 [tokens, width]; keys [tokens, kv.entry_bytes] are at the start
  int tokens, width;

  template <class Field>
  void fields(Field& field) {
    field("made", made);
    field("kv", kv);
    field("tokens", tokens, kPositive);
    field("width", width);
  }
};

// What each entry is worth to a row that could see more than `selects` of them: as of tokens in IndexScoresArgs.
struct EntryScoresArgs {
  const bf16* q;         // [rows, heads, kv.index_dim]
  const float* weights;  // null: all are 1; or [rows, heads]
  float* scores;         // [rows, entries of the longest sequence of the step, in whole key blocks]
  KvLayout kv;           // kv.index_offset: to bf16 [tokens / rate, kv.index_dim]
  int heads, rate, selects;

  template <class Field>
  void fields(Field& field) {
    field("q", q);
    field("weights", weights, kNullable);
    field("scores", scores);
    field("kv", kv);
    field("heads", heads, kPositive);
    field("rate", rate, kPositive);
    field("selects", selects, kPositive);
  }
};

// What each row sees: the last `window` tokens up to itself, by position; then entries, ascending, as the complement of
// their number: all whose windows have ended, or the `selects` of them with the largest scores, the first of equal
// ones. Where a score is no number, neither are the row's queries afterwards.
struct SeeArgs {
  const float* scores;  // null, or as those of EntryScoresArgs
  bf16* q;              // null without scores, or [rows, query_stride], of the attention that follows
  int32_t* seen;        // [rows, stride]
  int32_t* counts;      // [rows]
  int window, stride, query_stride;
  int rate;     // 0: there are no entries
  int selects;  // 0 without scores

  template <class Field>
  void fields(Field& field) {
    field("scores", scores, kNullable);
    field("q", q, kNullable);
    field("seen", seen);
    field("counts", counts);
    field("window", window, kPositive);
    field("stride", stride, kPositive);
    field("query_stride", query_stride);
    field("rate", rate);
    field("selects", selects);
  }
};

// The tokens that a row of more than `selects` pools sees, by position, ascending: those of the `selects` pools of
// `rate` tokens with the largest scores, the first of equal ones, then those whose pool has not ended. Other rows
// select none. Where a score is no number, neither are the row's queries afterwards.
struct SelectPoolsArgs {
  const float* scores;  // as those of EntryScoresArgs, pools being entries
  bf16* q;              // [rows, query_stride], of the attention that follows
  int32_t* selected;    // [rows, stride]
  int32_t* counts;      // [rows]: how many a row sees; 0: all up to itself
  int rate, selects, stride, query_stride;

  template <class Field>
  void fields(Field& field) {
    field("scores", scores);
    field("q", q);
    field("selected", selected);
    field("counts", counts);
    field("rate", rate, kPositive);
    field("selects", selects, kPositive);
    field("stride", stride, kPositive);
    field("query_stride", query_stride, kPositive);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_ENTRY_OPS(OP)        \
  OP(turn, TurnArgs)                \
  OP(unturn, UnturnArgs)            \
  OP(compress, CompressArgs)        \
  OP(keep, KeepArgs)                \
  OP(entry_scores, EntryScoresArgs) \
  OP(see, SeeArgs)                  \
  OP(select_pools, SelectPoolsArgs)

}  // namespace hybrid
