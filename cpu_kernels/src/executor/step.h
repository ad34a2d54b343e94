// What every kernel knows: the running step, its own part in an op, and the sizes that layouts are made of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrid {

using bf16 = uint16_t;  // bit pattern

// How a matrix is stored; hybrid/formats says the same in Python.
enum class Format {
  bf16,
  int8,
  int4,
  fp8,
  fp8_row,
  mxfp4,
  nvfp4,
  q8_0,
  q4_0,
  q5_0,
  q4_1,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  q4_t,
  q2_k
};
constexpr int kFormats = int(Format::q2_k) + 1;

enum class Activation { silu, swiglu_clamped, silu_clamped, gelu_tanh, relu_squared };

// Whether the activation takes a gate beside what is up; else experts have no matrix of one.
static inline bool is_gated(Activation activation) { return activation != Activation::relu_squared; }

// What a router makes of its logits: a softmax over all experts or over the chosen ones, a sigmoid each, for each
// chosen one a softmax over those left that are close to it, or the root of a softplus each.
enum class Scoring { softmax, topk_softmax, sigmoid, sparsemixer, root_softplus };

// How weights that few rows read once come from memory: some blocks by turns, asked for far ahead in the second-level
// cache, or a little ahead in the first; or one block after the other. The processor decides, when the module is
// loaded; results are the same.
enum class Reading { far, near, ordered };
inline Reading reading = Reading::far;

constexpr int kBlock = 16;          // columns in a packed block, keys in a key block
constexpr int kLine = 64;           // bytes: 16 columns x one pair of bf16
constexpr int kInputs = 64;         // inputs of a matrix are padded to a multiple of this
constexpr int kSumInputs = 32;      // inputs of one sum of an int8 activation row
constexpr int kScaleInputs = 256;   // inputs of one scale of an int8 activation row
constexpr int kRowGroup = 32;       // inputs of one scale, and of one sum, of a grouped activation row
constexpr int kPanelInputs = 256;   // a bf16 panel of 4 blocks is 32 KiB: it stays in L1 while all rows pass over it
constexpr int kTileRows = 16;       // rows of a matrix tile
constexpr int kStripRows = 32;      // rows that pass over a panel together, in two tiles
constexpr int kGroupBlocks = 16;    // blocks that take turns over a strip of rows
constexpr int kBandRows = 512;      // rows that weights are read once for
constexpr int kKeys = 256;          // keys of one partial softmax, so results never depend on how work is split
constexpr int kKeyInputs = 32;      // dimensions of a key are padded to a multiple of this
constexpr int kAttentionRows = 96;  // query rows times heads of one attention tile, unless one row has more heads
constexpr int kManyTiles = 128;     // of that size in a step; where it has fewer, they are half as large

constexpr int kMaxTileRows = 256;  // query heads of one KV head
constexpr int kMaxHeadDim = 1024;
constexpr int kMaxNodes = 16;   // memory nodes
constexpr int kMaxGroups = 64;  // of experts that a router chooses among

// A run of adjacent rows of one sequence that attention treats together.
struct AttentionTile {
  int row;        // first row of the step
  int rows;       // how many
  int sequence;   // whose keys and values
  int position;   // position of the first row
  int split;      // 1: every key block is a task of its own and `merge` joins them (decode)
  int task;       // first task of this tile, for one KV head
  int64_t state;  // first partial state of this tile, for one query head
};

// The extents of one step. Every op touches only these rows.
struct Step {
  int rows;
  const int32_t* tokens;     // [rows]
  const int32_t* sequences;  // [rows]
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

// One thread's part in an op. A thread may find nothing to do, or be the only one of the `threads` that comes.
struct Work {
  int threads, thread;
  uint64_t* taken;  // [2][threads], zero when the op begins: what was taken, as for_runs or for_shares counts
  char* scratch;    // as many bytes as executor/scratch.h says, at the start of a line; null if that is none

  // The same for what an op hands out after all else.
  Work second() const { return {threads, thread, taken + threads, scratch}; }
};

}  // namespace hybrid
