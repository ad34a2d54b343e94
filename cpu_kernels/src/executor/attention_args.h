// What the ops of attention work on.
#pragma once

#include "executor/rule.h"
#include "executor/step.h"

namespace hybrid {

struct KvLayout {
  char* base;  // of this layer
  int64_t sequence_stride, head_stride, value_offset;
  int key_dim, value_dim;             // padded
  Format format;                      // bf16, int8 or fp8
  int64_t key_scales, value_scales;   // from the start of a head to float32 [tokens]; of bf16 none
  bool shared;                        // all heads have the same keys, whose first value_dim dimensions are the values
  int64_t index_offset;               // from the start of a sequence to the keys of an indexer, bf16, of index_dim
  int index_dim;                      // padded; 0: there is no indexer
  int64_t entry_offset, entry_bytes;  // from the start of a sequence to entries, each a key that stands for several
                                      // tokens, and bytes of one: key_dim codes, then its scale; 0: there are none
  int64_t tail_offset;                // from the start of a sequence to what its last tokens bring to entries, float32

  template <class Field>
  void fields(Field& field) {
    field("base", base, kLines);
    field("sequence_stride", sequence_stride, kLines);
    field("head_stride", head_stride, kLines);
    field("value_offset", value_offset, kLines);
    field("key_dim", key_dim, Rule{false, false, kKeyInputs, kKeyInputs});
    field("value_dim", value_dim, Rule{false, false, kBlock, kBlock});
    field("format", format);
    field("key_scales_offset", key_scales, kLines);
    field("value_scales_offset", value_scales, kLines);
    field("shared", shared, kOptional);
    field("index_offset", index_offset, Rule{true, true, 0, kLine});
    field("index_dim", index_dim, Rule{true, true, 0, kKeyInputs});
    field("entry_offset", entry_offset, Rule{true, true, 0, kLine});
    field("entry_bytes", entry_bytes, Rule{true, true, 0, kLine});
    field("tail_offset", tail_offset, Rule{true, true, 0, kLine});
  }
};

struct QkvArgs {
  const float* qkv;
  const float* rope;    // [rows, rope_dim]; null if that is 0
  const float* q_norm;  // null, or [head_dim]; with norm_whole or norm_apart [heads * head_dim]
  const float* k_norm;
  bf16* q;  // null if there are no heads: only keys and values are stored
  KvLayout kv;
  int heads, kv_heads, head_dim, rope_dim;
  bool interleaved;
  int qkv_stride;
  float eps;
  bool norm_whole;       // one norm over all heads of the queries, and one over those of the keys
  bool norm_apart;       // LayerNorms without a bias, each head with weights of its own
  bool norm_last;        // norms come behind rope
  bool gated;            // behind each query head is its gate, of the same size, which this op steps over
  bool norm_values;      // values are normed too, without a weight
  bool keys_are_values;  // qkv has no values: they are the keys as they were before norm and rope
  float growth;          // of queries, see growth_at(); 0: none
  int growth_length;
  int value_head_dim;  // of a value, where that is not head_dim; 0: it is

  int value_width() const { return value_head_dim ? value_head_dim : head_dim; }

  template <class Field>
  void fields(Field& field) {
    field("qkv", qkv);
    field("rope", rope, kNullable);
    field("q_norm", q_norm, kNullable);
    field("k_norm", k_norm, kNullable);
    field("q", q, kNullable);
    field("kv", kv);
    field("heads", heads);
    field("kv_heads", kv_heads, kPositive);
    field("head_dim", head_dim, kPositive);
    field("rope_dim", rope_dim);
    field("interleaved", interleaved);
    field("qkv_stride", qkv_stride);
    field("eps", eps);
    field("norm_whole", norm_whole, kOptional);
    field("norm_apart", norm_apart, kOptional);
    field("norm_last", norm_last, kOptional);
    field("gated", gated, kOptional);
    field("norm_values", norm_values, kOptional);
    field("keys_are_values", keys_are_values, kOptional);
    field("growth", growth, kOptional);
    field("growth_length", growth_length, kOptional);
    field("value_head_dim", value_head_dim, kOptional);
  }
};

// Dimensions behind the `rank` of a latent that its key has: those that turn, or a pair of zeros, of which one can say
// that the latent is no number.
static inline int room_behind(int rope_dim) { return rope_dim ? rope_dim : 2; }

// Latent attention behind its projections: queries are divided, what is left of a token is normed and turned and
// written into the arena, as the one key of all heads.
struct LatentArgs {
  const float* queries;  // [rows, query_stride]: of each head nope_dim plain dimensions, then rope_dim that turn
  const float* latents;  // [rows, latent_stride]: rank dimensions that are normed, then rope_dim that turn
  const float* rope;     // [rows, rope_dim]; null where norm is, and where nothing turns
  const float* norm;     // [rank]; null: rows come normed and turned, without heads, and are only stored
  bf16* plain;           // [rows, heads, plain_stride]: what the matrices of heads turn into the first `rank` of q
  bf16* q;               // [rows, heads, key_dim]: only those behind the first `rank` are written
  KvLayout kv;
  int heads, nope_dim, rope_dim, rank;
  bool interleaved;
  int query_stride, latent_stride, plain_stride;
  float eps;
  float growth;  // as of QkvArgs
  int growth_length;

  template <class Field>
  void fields(Field& field) {
    field("queries", queries, kNullable);
    field("latents", latents);
    field("rope", rope, kNullable);
    field("norm", norm, kNullable);
    field("plain", plain, kNullable);
    field("q", q, kNullable);
    field("kv", kv);
    field("heads", heads);
    field("nope_dim", nope_dim, kPositive);
    field("rope_dim", rope_dim);
    field("rank", rank, kPositive);
    field("interleaved", interleaved);
    field("query_stride", query_stride);
    field("latent_stride", latent_stride);
    field("plain_stride", plain_stride);
    field("eps", eps);
    field("growth", growth, kOptional);
    field("growth_length", growth_length, kOptional);
  }
};

struct AttentionArgs {
  const bf16* q;
  bf16* output;        // null if there are partials
  float* states;       // [.., value_dim + 2]: partial sums, maximum, denominator
  const float* sinks;  // null, or [heads]: a logit without a value that shares in every softmax
  KvLayout kv;
  int heads, kv_heads, head_dim, output_stride;  // head_dim: of what a head attends to, its values
  int window;                                    // 0: none
  float scale;
  const int32_t* ends;  // null, or [rows], one for all rows of a sequence: keys from there on are attended elsewhere
  float* partials;      // null, or [rows, heads, value_dim + 16]: where states are left, for others to join, not output
  int output_head_stride;   // from the output of a head to the next; 0: head_dim
  const int32_t* selected;  // null, or [rows, selects]: the keys that a row of more than `selects` sees, ascending
  int selects;              // 0: every row sees all
  const int32_t* counts;    // null, or [rows]: how many keys of `selected` each row sees, whatever its position; 0: all
                            // up to itself, and so do the rows before it in its sequence
  const char* fresh;      // null, or keys of the rows of the step, [rows, kv.entry_bytes] as entries lie: then keys of
                          // earlier tokens lie so too, from the start of a sequence on, see KeepArgs, and those that
                          // are selected below 0 are complements of numbers of entries
  int kept;               // how many of those there are
  const int32_t* blocks;  // null, or [rows, kv_heads, block_count]: of a row that sees more blocks of keys, which
  int block_count;
  float score_cap;  // between which and less itself a tangent keeps scores; 0: no bounds

  template <class Field>
  void fields(Field& field) {
    field("q", q);
    field("output", output, kNullable);
    field("states", states);
    field("sinks", sinks, kNullable);
    field("kv", kv);
    field("heads", heads, kPositive);
    field("kv_heads", kv_heads, kPositive);
    field("head_dim", head_dim, kPositive);
    field("output_stride", output_stride);
    field("window", window);
    field("scale", scale);
    field("ends", ends, kOptional);
    field("partials", partials, kOptional);
    field("output_head_stride", output_head_stride, kOptional);
    field("selected", selected, kOptional);
    field("selects", selects, kOptional);
    field("counts", counts, kOptional);
    field("fresh", fresh, kOptional);
    field("kept", kept, kOptional);
    field("blocks", blocks, kOptional);
    field("block_count", block_count, kOptional);
    field("score_cap", score_cap, kOptional);
  }
};

// What attention made, times the sigmoid of a gate for each value; or its softplus, or one gate a head.
struct GateArgs {
  bf16* values;        // [rows, stride], changed in place
  const float* gates;  // [rows, gate_stride]
  int heads, head_dim, stride, gate_stride;
  int gate_head_stride;  // from the gates of a head to the next
  bool softplus, per_head;

  template <class Field>
  void fields(Field& field) {
    field("values", values);
    field("gates", gates);
    field("heads", heads, kPositive);
    field("head_dim", head_dim, kPositive);
    field("stride", stride);
    field("gate_stride", gate_stride);
    field("gate_head_stride", gate_head_stride);
    field("softplus", softplus, kOptional);
    field("per_head", per_head, kOptional);
  }
};

// The second half of attention: joins the parts of split tiles. The executor adds it by itself.
struct MergeArgs {
  AttentionArgs attention;
};

// As HYBRID_ROW_OPS.
#define HYBRID_ATTENTION_OPS(OP) \
  OP(qkv, QkvArgs)               \
  OP(latent, LatentArgs)         \
  OP(attention, AttentionArgs)   \
  OP(gate, GateArgs)

}  // namespace hybrid
