// Plain structs between the executor and the kernels: what an op works on, and the extents of the running step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrid {

using bf16 = uint16_t;  // bit pattern

// How a matrix is stored; hybrid/formats says the same in Python.
enum class Format { bf16, int8, int4, fp8, mxfp4 };
constexpr int kFormats = 5;

// Whether weights that are read once are fetched into the first-level cache, a little ahead, or into the second, far
// ahead. The processor decides, when the module is loaded; results are the same.
inline bool fetch_near = false;

enum class Activation { silu, swiglu_clamped };

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
  int tile_rows;        // where the Isa has matrix tiles: rows from which products use them; 0: where they are faster
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
  bf16* output;       // null unless a matrix of the float kind reads it
  float* output_f32;  // null unless a router reads it
  char* output8;      // int8 activation rows; null unless a matrix of the integer kind reads them
  int width, input_stride, output_stride;
  int64_t output8_stride;  // bytes
  float eps;
  int logit_rows;  // 1: only the rows whose logits are wanted, gathered
};

// bf16 rows to int8 activation rows.
struct QuantiseArgs {
  const bf16* input;
  char* output;
  int width;                            // inputs, padded
  int64_t input_stride, output_stride;  // bytes
  int multiple;                         // rows of input for each row of the step
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
  int accumulate;    // 1: add to output
  int first_column;  // of the logits, where a node's part of them begins
};

struct KvLayout {
  char* base;  // of this layer
  int64_t slot_stride, head_stride, value_offset;
  int key_dim, value_dim;            // padded
  Format format;                     // bf16, int8 or fp8
  int64_t key_scales, value_scales;  // from the start of a head to float32 [tokens]; of bf16 none
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
  float* states;       // [.., value_dim + 2]: partial sums, maximum, denominator
  const float* sinks;  // null, or [heads]: a logit without a value that shares in every softmax
  KvLayout kv;
  int heads, kv_heads, head_dim, output_stride;
  int window;  // 0: none
  float scale;
  const int32_t* ends;  // null, or [rows], the same for the rows of a slot: keys from there on are attended elsewhere
  float* partials;      // null, or [rows, heads, value_dim + 16]: where states are left, for others to join, not output
};

struct RouterArgs {
  const float* input;
  const float* weight;  // [experts, hidden]
  const float* bias;    // null, or [experts]
  float* logits;        // [rows, experts]
  int experts, hidden, input_stride;
};

struct TopkArgs {
  const float* logits;    // [rows, experts], or with a gate [rows, experts + 1]: that of the shared expert behind them
  int32_t* ids;           // [rows, top_k], in order of falling score
  float* weights;         // [rows, top_k]
  float* shared_weights;  // null: no gate; or [rows], the sigmoid of the gate
  int experts, top_k, renormalise, softmax_after;
  float scale;
};

struct GroupArgs {
  const int32_t* ids;    // null: one expert takes every row; a negative id is computed elsewhere and left out
  const float* weights;  // null: all are 1
  Routing routing;
  int32_t* pairs;  // null, or [rows * top_k]: beside every entry of `routing` its place in ids
  int experts, top_k;
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
};

// Gate and up of the routed experts and of the expert that all rows share, which may differ in format and size.
struct GateUpArgs {
  ExpertSet routed, shared;  // biases: [experts][blocks][gate, up][16]
  bf16* output;              // [rows * top_k, output_stride], in routing order
  bf16* shared_output;       // [rows, shared_output_stride]
  int output_stride, shared_output_stride;
  Activation activation;
};

// The down matrices of the same; their input rows are in routing order.
struct DownArgs {
  ExpertSet routed, shared;  // from the first down matrix on; biases: [experts][blocks * 16]
  float* output;             // added to
  int output_stride;
};

constexpr int kMaxNodes = 16;  // memory nodes

// Adds what every node summed to the output, in ascending order of nodes, and clears it for the next layer.
struct JoinArgs {
  float* partials[kMaxNodes];  // of each node: rows laid out as those of the output
  float* output;
  int nodes, width, output_stride;
};

// Adds what every expert made of a row to it, weighted, in ascending order of experts, as DownArgs does with experts
// that are all at one place. Leaves the contributions cleared.
struct CombineArgs {
  const int32_t* ids;  // [rows, top_k]
  const float* weights;
  float* contributions;  // [rows * top_k, stride], in the order of ids
  float* output;
  int top_k, width, stride, output_stride;
};

constexpr int kBlock = 16;          // columns in a packed block, keys in a key block
constexpr int kLine = 64;           // bytes: 16 columns x one pair of bf16
constexpr int kInputs = 64;         // inputs of a matrix are padded to a multiple of this
constexpr int kSumInputs = 32;      // inputs of one sum of an int8 activation row
constexpr int kScaleInputs = 256;   // inputs of one scale of an int8 activation row
constexpr int kKeys = 256;          // keys of one partial softmax, so results never depend on how work is split
constexpr int kAttentionRows = 48;  // query rows times heads of one attention tile, unless one row has more heads

constexpr int kOpenedColumns = 64;  // of keys or values that attention opens at a time, at most

constexpr int kMaxTileRows = 256;  // query heads of one KV head at most
constexpr int kMaxHeadDim = 1024;

// The kernels of one instruction set.
struct KernelTable {
  const char* name;
  void (*embed)(const EmbedArgs&, const Step&, const Work&);
  void (*norm)(const NormArgs&, const Step&, const Work&);
  void (*quantise)(const QuantiseArgs&, const Step&, const Work&);
  void (*gemm[kFormats])(const GemmArgs&, const Step&, const Work&);
  void (*qkv)(const QkvArgs&, const Step&, const Work&);
  void (*attention)(const AttentionArgs&, const Step&, const Work&);
  void (*merge)(const AttentionArgs&, const Step&, const Work&);
  void (*router)(const RouterArgs&, const Step&, const Work&);
  void (*topk)(const TopkArgs&, const Step&, const Work&);
  void (*gate_up)(const GateUpArgs&, const Step&, const Work&);
  void (*down)(const DownArgs&, const Step&, const Work&);
  void (*join)(const JoinArgs&, const Step&, const Work&);
  void (*combine)(const CombineArgs&, const Step&, const Work&);
  float (*read)(const char* data, int64_t bytes);  // streams through memory: the bandwidth probe
  double (*multiply)(int64_t rounds);              // dot products of bf16 in registers, returns operations done
  double (*multiply_int)(int64_t rounds);          // the same of int8
};

}  // namespace hybrid
