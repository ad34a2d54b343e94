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

// Of product() in ops/product.h: sums, and a panel of opened blocks unless stored lines are operands as they are. Tiles
// take more blocks together, and no more than a band of rows, which they copy.
static inline int64_t product_bytes(const ProductSizes& sizes, Format format, int rows, int inputs) {
  const int64_t panel = sizes.opened[int(format)] ? 0 : kPanelBytes;
  const int64_t in_registers = sums_bytes(rows, sizes.max_blocks) + sizes.max_blocks * panel;
  const StripSize& strip = sizes.strips[int(format)];
  if (!strip.bytes) return in_registers;
  const int band = rows < kBandRows ? rows : kBandRows;
  const int64_t strips = int64_t(band + kStripRows - 1) / kStripRows * ((inputs + strip.inputs - 1) / strip.inputs);
  const int64_t in_tiles = sums_bytes(whole_tiles(band), kGroupBlocks) + kGroupBlocks * panel + strips * strip.bytes;
  return max_bytes(in_registers, in_tiles);
}

static inline int64_t product_bytes(const ProductSizes& sizes, const ExpertSet& set, int rows) {
  return set.inputs ? product_bytes(sizes, set.format, rows, set.inputs) : 0;  // else there is none
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

// Where things are of keys that a row selected, which are brought together as one key block: they, their values if
// these are not shared, and the scales of both.
struct GatheredOffsets {
  int64_t values, key_scales, value_scales, end;
};

static inline GatheredOffsets gathered_offsets(const KvLayout& kv) {
  const int size = kv.format == Format::bf16 ? 2 : 1;
  const int64_t scales = kKeys * int64_t(sizeof(float));
  GatheredOffsets at{};
  at.values = int64_t(kKeys) * kv.key_dim * size;
  at.key_scales = at.values + (kv.shared ? 0 : int64_t(kKeys) * kv.value_dim * size);
  at.value_scales = kv.shared ? at.key_scales : at.key_scales + scales;
  at.end = at.value_scales + scales;
  return at;
}

// A key block as operands of both products, values and keys, and the scales of keys.
static inline int64_t seen_bytes(const KvLayout& kv) {
  return turned_bytes(kv) + int64_t(kKeys) * kv.key_dim * 2 + kKeys * int64_t(sizeof(float));
}

// What a thread needs for an op in a step of at most `rows` rows, whatever its number of rows and whether tiles are
// used. All are whole lines. An op that is not named here gets none.
template <class Args>
static inline int64_t scratch_bytes(const Args&, const ProductSizes&, int) {
  return 0;
}
static inline int64_t scratch_bytes(const GemmArgs& args, const ProductSizes& sizes, int rows) {
  return product_bytes(sizes, args.format, rows, args.inputs);
}
static inline int64_t scratch_bytes(const HeadGemmArgs& args, const ProductSizes& sizes, int rows) {
  return product_bytes(sizes, args.format, rows, args.inputs);
}
static inline int64_t scratch_bytes(const GateUpArgs& args, const ProductSizes& sizes, int rows) {
  return max_bytes(product_bytes(sizes, args.routed, rows), product_bytes(sizes, args.shared, rows));
}
static inline int64_t scratch_bytes(const DownArgs& args, const ProductSizes& sizes, int rows) {
  return max_bytes(product_bytes(sizes, args.routed, rows), product_bytes(sizes, args.shared, rows));
}
static inline int64_t scratch_bytes(const AttentionArgs& args, const ProductSizes& sizes, int rows) {
  const int group = args.heads / args.kv_heads, tile_rows = attention_tile_rows(group);
  const int together = group * (rows < tile_rows ? rows : tile_rows);
  if (args.fresh) return attention_offsets(args.heads, args.kv.value_dim).opened + seen_bytes(args.kv);
  const int64_t gathered = args.selects ? gathered_offsets(args.kv).end : 0;
  return attention_offsets(together, args.kv.value_dim).opened + opened_bytes(sizes, args.kv) + gathered;
}
static inline int64_t scratch_bytes(const IndexScoresArgs& args, const ProductSizes&, int) {
  return int64_t(args.heads) * kKeys * sizeof(float);
}
static inline int64_t scratch_bytes(const EntryScoresArgs& args, const ProductSizes&, int) {
  return int64_t(kKeys) * args.kv.index_dim * 2 +
         int64_t(args.heads) * kKeys * sizeof(float);  // entries, and their products
}
static inline int64_t scratch_bytes(const BlockScoresArgs& args, const ProductSizes&, int) {
  return int64_t(args.heads) * kKeys * sizeof(float);
}

}  // namespace hybrid
