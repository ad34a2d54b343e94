// How the scratch of a thread is divided, and so how much of it an op needs. Kernels divide it by the same functions by
// which plans are made. They are `static`: each instruction set compiles its own, see CMakeLists.txt.
#pragma once

#include "executor/ops.h"

namespace hybrid {

constexpr int kPanelBytes = kPanelInputs / 2 * kLine;  // of one block, opened

static inline int64_t max_bytes(int64_t a, int64_t b) { return a > b ? a : b; }

// Of unfinished products.
static inline int64_t sums_bytes(int rows, int blocks) { return int64_t(rows) * blocks * kBlock * sizeof(float); }

static inline int whole_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// From one copied row to the next: a line further apart than they are long, so that they do not compete for one set of
// the cache.
static inline int64_t copy_stride(int64_t row_bytes) { return row_bytes + kLine; }

// Of product() in ops/product.h: sums, a panel of opened blocks unless stored lines are operands as they are, and for
// tiles copies of rows. scattered: the rows do not lie at equal distances, so all may have to be copied; else only
// those that do not fill a tile.
static inline int64_t product_bytes(const ProductSizes& sizes, Format format, int rows, int inputs, bool scattered) {
  const int64_t opened = sizes.opened[int(format)] ? 0 : int64_t(sizes.max_blocks) * kPanelBytes;
  if (!sizes.has_tiles) return sums_bytes(rows, sizes.max_blocks) + opened;
  const int64_t copies = scattered ? whole_tiles(rows) : kTileRows;
  const int64_t row_bytes = int64_t(inputs) / sizes.step_inputs[int(format)] * 4;
  return sums_bytes(whole_tiles(rows), sizes.max_blocks) + opened + copies * copy_stride(row_bytes);
}

static inline int64_t product_bytes(const ProductSizes& sizes, const ExpertSet& set, int rows, bool scattered) {
  return product_bytes(sizes, set.format, rows, set.inputs, scattered);
}

// Rows of the step in one attention tile at most. group: query heads per KV head.
static inline int attention_tile_rows(int group) { return group < kAttentionRows ? kAttentionRows / group : 1; }

// Where things are in an attention tile's scratch, in bytes; scores are at its start.
struct AttentionOffsets {
  int64_t current, joined, weights, opened;
};

static inline int64_t state_bytes(int value_dim) { return int64_t(value_dim + kBlock) * sizeof(float); }

// rows: query rows times heads.
static inline AttentionOffsets attention_offsets(int rows, int value_dim) {
  AttentionOffsets at{};
  at.current = int64_t(rows) * kKeys * sizeof(float);
  at.joined = at.current + rows * state_bytes(value_dim);
  at.weights = at.joined + rows * state_bytes(value_dim);
  at.opened = at.weights + int64_t(rows) * kKeys * sizeof(bf16);
  return at;
}

// From a block of 16 values, of all keys of a key block, to the next: a line more than they are, against conflicts in
// the cache.
constexpr int kTurnedBytes = (kKeys / 2 + 1) * kLine;

// Values that a key block shares with its keys.
static inline int64_t turned_bytes(const KvLayout& kv) { return int64_t(kv.value_dim) / kBlock * kTurnedBytes; }

// All values of a key block that shares them with its keys, and these as bf16.
static inline int64_t shared_bytes(const KvLayout& kv) {
  return turned_bytes(kv) + (kv.format == Format::bf16 ? 0 : int64_t(kKeys) * kv.key_dim * 2);
}

// Blocks of keys, or of values, as bf16; where both are shared, all values of a key block and all its keys.
static inline int64_t opened_bytes(const ProductSizes& sizes, const KvLayout& kv) {
  if (kv.shared) return shared_bytes(kv);
  return kv.format == Format::bf16 ? 0 : sizes.max_blocks * max_bytes(kv.key_dim, kKeys) / 2 * kLine;
}

// Of keys that a row selected, which are brought together as one key block: they and their scales.
static inline int64_t gathered_bytes(const KvLayout& kv) {
  return int64_t(kKeys) * kv.key_dim * (kv.format == Format::bf16 ? 2 : 1) + kKeys * int64_t(sizeof(float));
}

// What a thread needs for an op in a step of at most `rows` rows, whatever its number of rows and whether tiles are
// used. All are whole lines. An op that is not named here gets none.
template <class Args>
static inline int64_t scratch_bytes(const Args&, const ProductSizes&, int) {
  return 0;
}
static inline int64_t scratch_bytes(const GemmArgs& args, const ProductSizes& sizes, int rows) {
  return product_bytes(sizes, args.format, rows, args.inputs, false);
}
static inline int64_t scratch_bytes(const HeadGemmArgs& args, const ProductSizes& sizes, int rows) {
  return product_bytes(sizes, args.format, rows, args.inputs, false);
}
static inline int64_t scratch_bytes(const GateUpArgs& args, const ProductSizes& sizes, int rows) {
  return max_bytes(product_bytes(sizes, args.routed, rows, true), product_bytes(sizes, args.shared, rows, true));
}
static inline int64_t scratch_bytes(const DownArgs& args, const ProductSizes& sizes, int rows) {
  return max_bytes(product_bytes(sizes, args.routed, rows, false), product_bytes(sizes, args.shared, rows, false));
}
static inline int64_t scratch_bytes(const AttentionArgs& args, const ProductSizes& sizes, int rows) {
  const int group = args.heads / args.kv_heads, tile_rows = attention_tile_rows(group);
  const int together = group * (rows < tile_rows ? rows : tile_rows);
  const int64_t gathered = args.selects ? gathered_bytes(args.kv) : 0;
  return attention_offsets(together, args.kv.value_dim).opened + opened_bytes(sizes, args.kv) + gathered;
}
static inline int64_t scratch_bytes(const IndexScoresArgs& args, const ProductSizes&, int) {
  return int64_t(args.heads) * kKeys * sizeof(float);
}

}  // namespace hybrid
