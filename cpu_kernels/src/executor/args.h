// Plain structs between the executor and the kernels: what an op works on, and the extents of the running step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrid {

using bf16 = uint16_t;  // bit pattern

// A run of adjacent rows of one sequence that attention treats together.
struct AttentionTile {
  int row;        // first row of the step
  int rows;       // how many
  int slot;       // KV slot
  int position;   // position of the first row
  int split;      // 1: every key block is a task of its own and `merge` joins them (decode)
  int task;       // first task of this tile, for one KV head
  int64_t state;  // first partial state of this tile, for one query head
};

// The extents of one step. Every op touches only these rows.
struct Step {
  int rows;
  const int32_t* tokens;     // [rows]
  const int32_t* slots;      // [rows]
  const int32_t* positions;  // [rows]
  int logit_rows;
  const int32_t* logit_index;  // [logit_rows], rows whose logits are wanted
  float* logits;               // [logit_rows, vocab]
  const AttentionTile* tiles;
  int tile_count;
  int attention_tasks;  // per KV head
  int split_tiles;      // how many tiles need a merge
};

// One thread's part in an op. `counter`, zero when the op begins, hands out what the threads share.
struct Work {
  int thread;
  int threads;
  int* counter;
  char* scratch;
};

// Which rows go to which expert, rebuilt at every MoE layer.
struct Routing {
  int32_t* offsets;  // [experts + 1], into rows and weights
  int32_t* rows;     // [rows * top_k], sorted by expert, then by row
  float* weights;    // [rows * top_k]
  int32_t* active;   // [experts], those with at least one row, ascending
  int32_t* count;    // [1], how many are active
};

struct EmbedArgs {
  const char* table;  // packed [vocab, hidden]
  float* output;
  int hidden, pairs, output_stride;
};

struct RopeTableArgs {
  const float* inverse_frequencies;  // [dim / 2]
  float* table;                      // [rows, dim]: cosines, then sines
  int dim;
  float factor;
};

struct NormArgs {
  const float* input;
  const float* weight;
  bf16* output;
  float* output_f32;  // null unless a router reads it
  int width, input_stride, output_stride;
  float eps;
  int logit_rows;  // 1: only the rows whose logits are wanted, gathered
};

struct GemmArgs {
  const bf16* input;
  const char* weight;
  const float* bias;  // null, or [columns]
  float* output;      // null: the step's logits
  int columns, pairs, input_stride, output_stride;
  int accumulate;  // 1: add to output
};

struct KvLayout {
  char* base;  // of this layer
  int64_t slot_stride, head_stride, value_offset;
  int key_dim, value_dim;  // padded
};

struct QkvArgs {
  const float* qkv;
  const float* rope;    // [rows, rope_dim]
  const float* q_norm;  // null, or [head_dim]
  const float* k_norm;
  bf16* q;
  KvLayout kv;
  int heads, kv_heads, head_dim, rope_dim, interleaved, qkv_stride;
  float eps;
};

struct AttentionArgs {
  const bf16* q;
  bf16* output;
  float* states;  // [.., value_dim + 2]: partial sums, maximum, denominator
  KvLayout kv;
  int heads, kv_heads, head_dim, output_stride;
  int window;  // 0: none
  float scale;
};

struct RouterArgs {
  const float* input;
  const float* weight;  // [experts, hidden]
  float* logits;        // [rows, experts]
  int experts, hidden, input_stride;
};

struct TopkArgs {
  const float* logits;
  int32_t* ids;    // [rows, top_k], in order of falling score
  float* weights;  // [rows, top_k]
  int experts, top_k, renormalise, softmax_after;
  float scale;
};

struct GroupArgs {
  const int32_t* ids;  // null: one expert takes every row with weight 1
  const float* weights;
  Routing routing;
  int experts, top_k;
};

struct GateUpArgs {
  const bf16* input;
  Routing routing;
  const char* experts;
  bf16* output;  // [rows * top_k, output_stride], in routing order
  int64_t expert_stride;
  int blocks, pairs, input_stride, output_stride;
};

struct DownArgs {
  const bf16* input;
  Routing routing;
  const char* experts;  // at the first down matrix
  float* output;        // added to
  int64_t expert_stride;
  int blocks, pairs, input_stride, output_stride;
};

constexpr int kBlock = 16;          // columns in a packed block, keys in a key block
constexpr int kLine = 64;           // bytes: 16 columns x one pair of bf16
constexpr int kKeys = 256;          // keys of one partial softmax, so results never depend on how work is split
constexpr int kAttentionRows = 48;  // query rows times heads of one attention tile, unless one row has more heads

constexpr int kMaxTileRows = 256;  // query heads of one KV head at most
constexpr int kMaxHeadDim = 1024;

// The kernels of one instruction set.
struct KernelTable {
  const char* name;
  void (*embed)(const EmbedArgs&, const Step&, const Work&);
  void (*norm)(const NormArgs&, const Step&, const Work&);
  void (*gemm)(const GemmArgs&, const Step&, const Work&);
  void (*qkv)(const QkvArgs&, const Step&, const Work&);
  void (*attention)(const AttentionArgs&, const Step&, const Work&);
  void (*merge)(const AttentionArgs&, const Step&, const Work&);
  void (*router)(const RouterArgs&, const Step&, const Work&);
  void (*topk)(const TopkArgs&, const Step&, const Work&);
  void (*gate_up)(const GateUpArgs&, const Step&, const Work&);
  void (*down)(const DownArgs&, const Step&, const Work&);
  float (*read)(const char* data, int64_t bytes);  // streams through memory: the bandwidth probe
  double (*multiply)(int64_t rounds);              // dot products in registers, returns operations done
};

}  // namespace hybrid
