// Attention of rows to the keys that `see` names: of the last tokens and of entries, wherever they lie. The keys of a
// block are brought together once for all heads of a row, as operands of both products.
#pragma once

#include "ops/attention.h"

namespace hybrid {
namespace HYBRID_ISA {

alignas(kLine) constexpr char kNoKey[kMaxHeadDim * 2 + kLine] = {};  // what pads the last 16 of a block

// A key block in scratch: values as turned_product() makes them, keys as KvBf16 has them.
struct SeenKeys {
  char *values, *keys;
  float* scales;
};

static HYBRID_INLINE SeenKeys carve_seen(const KvLayout& kv, char* scratch) {
  char* const keys = scratch + turned_bytes(kv);
  return {scratch, keys, reinterpret_cast<float*>(keys + int64_t(kKeys) * token_bytes<KvBf16>(kv.key_dim))};
}

// A key that the row sees: of a token of this step, of an earlier one, or an entry.
static HYBRID_INLINE const char* seen_key(const AttentionArgs& args, const Step& step, int row, int32_t number) {
  const int sequence = step.sequences[row];
  const char* const state = kv_head(args.kv, sequence, 0);
  if (number < 0) return state + args.kv.entry_offset + ~number * args.kv.entry_bytes;
  const int before = row - (step.positions[row] - number);
  if (before >= 0 && step.sequences[before] == sequence) return args.fresh + before * args.kv.entry_bytes;
  return state + number % args.kept * args.kv.entry_bytes;
}

// Sixteen codes of two keys as a line of values.
template <class Kv>
static HYBRID_INLINE void pair_keys(const char* a, const char* b, char* out) {
  if constexpr (Kv::scaled) return Isa::store_line(out, Isa::make_line(Kv::widen(a), Kv::widen(b)));
  using Codes = bf16 __attribute__((vector_size(kBlock * sizeof(bf16))));
  using Words = uint32_t __attribute__((vector_size(kLine)));
  Codes x, y;
  __builtin_memcpy(&x, a, sizeof x);
  __builtin_memcpy(&y, b, sizeof y);
  const Words line = __builtin_convertvector(x, Words) | __builtin_convertvector(y, Words) << 16;
  __builtin_memcpy(out, &line, sizeof line);
}

// Sixteen keys as operands of both products.
template <class Kv>
static HYBRID_KERNEL void lay_out_keys(const char* const (&from)[kBlock], const KvLayout& kv, char* keys,
                                       char* values) {
  alignas(kLine) char no_values[kTurned * kLine];
  for (int dim = 0; dim < kv.key_dim; dim += kBlock) {
    char* const lines = dim < kv.value_dim ? values + dim / kBlock * kTurnedBytes : no_values;
    for (int pair = 0; pair < kTurned; ++pair)
      pair_keys<Kv>(from[2 * pair] + token_bytes<Kv>(dim), from[2 * pair + 1] + token_bytes<Kv>(dim),
                    lines + pair * kLine);
    Isa::turn_lines(lines, keys + dim / 2 * kLine);
  }
}

// Brings key block `block` of a row together; returns how many keys it has.
template <class Kv>
static HYBRID_INLINE int bring(const AttentionArgs& args, const Step& step, int row, int block, const SeenKeys& to) {
  const int32_t* numbers = args.selected + int64_t(row) * args.selects + block * kKeys;
  const int count = min(kKeys, args.counts[row] - block * kKeys), dim = args.kv.key_dim;
  for (int first = 0; first < count; first += kBlock) {
    const char* from[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      from[i] = first + i < count ? seen_key(args, step, row, numbers[first + i]) : kNoKey;
      if constexpr (Kv::scaled) __builtin_memcpy(to.scales + first + i, from[i] + dim, sizeof(float));
    }
    lay_out_keys<Kv>(from, args.kv, to.keys + first * token_bytes<KvBf16>(dim), to.values + first / 2 * kLine);
  }
  return count;
}

// `count` keys for a row and the heads of one KV head, as attend_block(): their state into s.current.
template <class Kv>
static HYBRID_KERNEL void attend_brought(const Tiles<Bf16>& tiles, const AttentionArgs& args, int row, int kv_head,
                                         int count, const SeenKeys& keys, const AttentionScratch& s) {
  const int group = args.heads / args.kv_heads, dim = args.kv.key_dim, value_dim = args.kv.value_dim;
  const int used = (count + kBlock - 1) / kBlock * kBlock;
  BlockScales scales;
  if constexpr (Kv::scaled) load_scales<Kv>(args, keys.scales, keys.scales, used, scales);
  const F32 scale = Isa::set(score_scale(args));
  const bf16* const queries = args.q + (int64_t(row) * args.heads + kv_head * group) * dim;
  small_product<KvBf16>(
      tiles, [&](int i) { return queries + int64_t(i) * dim; }, group,
      {keys.keys, token_bytes<KvBf16>(dim) * kBlock, kLine, nullptr, 0}, dim / 2, used / kBlock, keys.values, nullptr,
      [&](F32 acc, int i, int column) {
        const F32 factor = Kv::scaled ? Isa::load(scales.keys + column * kBlock) : scale;
        Isa::store(s.scores + i * kKeys + column * kBlock, Isa::mul(acc, factor));
      });
  for (int i = 0; i < group; ++i)
    softmax(s.scores + i * kKeys, Kv::scaled ? scales.values : nullptr, s.weights + i * kKeys,
            s.current + i * s.state_stride, value_dim, {0, count}, used);
  small_product<Bf16>(
      tiles, [&](int i) { return s.weights + i * kKeys; }, group, {keys.values, kTurnedBytes, kLine, nullptr, 0},
      used / 2, value_dim / kBlock, keys.keys, nullptr,
      [&](F32 acc, int i, int column) { Isa::store(s.current + i * s.state_stride + column * kBlock, acc); });
}

static HYBRID_INLINE int seen_blocks(const AttentionArgs& args, int row) {
  return (args.counts[row] + kKeys - 1) / kKeys;
}

// All that a row sees, for all heads, joined block by block.
template <class Kv>
static HYBRID_INLINE void attend_row(const Tiles<Bf16>& tiles, const AttentionArgs& args, const Step& step, int row,
                                     char* scratch) {
  const int group = args.heads / args.kv_heads, dim = args.kv.value_dim, blocks = seen_blocks(args, row);
  const AttentionScratch s = carve(scratch, args.heads, dim);
  const SeenKeys keys = carve_seen(args.kv, s.opened);
  for (int block = 0; block < blocks; ++block) {
    const int count = bring<Kv>(args, step, row, block, keys);
    for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
      float* const joined = s.joined + int64_t(kv_head) * group * s.state_stride;
      AttentionScratch part = s;
      if (block == 0) part.current = joined;
      attend_brought<Kv>(tiles, args, row, kv_head, count, keys, part);
      for (int i = 0; block && i < group; ++i)
        join_states(joined + i * s.state_stride, s.current + i * s.state_stride, dim);
    }
  }
  for (int head = 0; head < args.heads; ++head) leave(args, row, head, s.joined + int64_t(head) * s.state_stride);
}

// One key block of a decode row for the heads of one KV head, left for `merge`.
template <class Kv>
static HYBRID_INLINE void attend_seen_part(const Tiles<Bf16>& tiles, const AttentionArgs& args, const Step& step,
                                           const AttentionTile& tile, int kv_head, int block, char* scratch) {
  const int group = args.heads / args.kv_heads, dim = args.kv.value_dim;
  AttentionScratch s = carve(scratch, args.heads, dim);
  const SeenKeys keys = carve_seen(args.kv, s.opened);
  s.current = partial(args, tile, kv_head * group, block);
  s.state_stride = (tile.position + kKeys) / kKeys * (dim + kBlock);
  attend_brought<Kv>(tiles, args, tile.row, kv_head, bring<Kv>(args, step, tile.row, block, keys), keys, s);
}

// A task is a row, or of a split tile a key block and KV head.
static HYBRID_INLINE int seen_tasks(const AttentionArgs& args, const AttentionTile& tile) {
  return tile.split ? seen_blocks(args, tile.row) * args.kv_heads : tile.rows;
}

template <class Kv>
static HYBRID_KERNEL void attend_seen(const AttentionArgs& args, const Step& step, const Work& work) {
  const Tiles<Bf16> tiles(Bf16{}, step, kMaxTileRows);
  const AttentionTile* tile = step.tiles;
  int tasks = 0, first = 0;  // first: the first task of `tile`
  for (int i = 0; i < step.tile_count; ++i) tasks += seen_tasks(args, step.tiles[i]);
  for_each(tasks, 1, work, [&](int task) {
    for (int own; task >= first + (own = seen_tasks(args, *tile)); ++tile) first += own;
    const int index = task - first;
    if (!tile->split) return attend_row<Kv>(tiles, args, step, tile->row + index, work.scratch);
    attend_seen_part<Kv>(tiles, args, step, *tile, index % args.kv_heads, index / args.kv_heads, work.scratch);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
