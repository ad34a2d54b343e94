// Causal attention over the KV arena, in blocks of kKeys keys.
//
// Every key block gives a softmax of its own (maximum, denominator, weighted values); blocks are joined in ascending
// order by log-sum-exp. Prefill joins as it goes, decode computes blocks in parallel and joins afterwards: the same
// arithmetic either way, so a token's result does not depend on how its prompt was cut or on the number of threads.
#pragma once

#include "ops/product.h"
#include "ops/qkv.h"

namespace hybrid {
namespace HYBRID_ISA {

// A softmax over some keys: value_dim weighted sums, then the maximum score, then the denominator.
static HYBRID_INLINE void join(float* into, const float* from, int dim) {
  const float top = into[dim] > from[dim] ? into[dim] : from[dim];
  const float keep = exponential(into[dim] - top), more = exponential(from[dim] - top);
  for (int i = 0; i < dim; i += kBlock)
    Isa::store(into + i, Isa::fma(Isa::load(from + i), Isa::set(more), Isa::mul(Isa::load(into + i), Isa::set(keep))));
  into[dim] = top;
  into[dim + 1] = into[dim + 1] * keep + from[dim + 1] * more;
}

static HYBRID_INLINE void finish(bf16* out, const float* state, int dim, int head_dim) {
  const F32 scale = Isa::set(1.0f / state[dim + 1]);
  for (int i = 0; i < head_dim; i += kBlock)
    store_some_bf16(out + i, Isa::mul(Isa::load(state + i), scale), least(kBlock, head_dim - i));
}

// The keys of block `block` that the query at `position` sees, counted from the block's first.
static HYBRID_INLINE Range visible(const AttentionArgs& args, int position, int block) {
  const int first = args.window ? most(0, position - args.window + 1 - block * kKeys) : 0;
  return {least(first, kKeys), least(position + 1 - block * kKeys, kKeys)};
}

// The first key block of which the query at `position` sees anything.
static HYBRID_INLINE int first_block(const AttentionArgs& args, int position) {
  return args.window ? most(0, position - args.window + 1) / kKeys : 0;
}

struct AttentionScratch {
  float* scores;   // [rows, kKeys]
  bf16* weights;   // [rows, kKeys]
  float* current;  // [rows, value_dim + 16]: this block's state
  float* joined;   // [rows, value_dim + 16]: all blocks so far
  int state_stride;
};

static HYBRID_INLINE AttentionScratch carve(char* scratch, int rows, int value_dim) {
  AttentionScratch s;
  s.state_stride = value_dim + kBlock;
  s.scores = reinterpret_cast<float*>(scratch);
  s.current = s.scores + rows * kKeys;
  s.joined = s.current + rows * s.state_stride;
  s.weights = reinterpret_cast<bf16*>(s.joined + rows * s.state_stride);
  return s;
}

// Scores of a row to weights; the maximum and the denominator go into its state. False if the row sees no key here.
static HYBRID_INLINE bool softmax(const float* scores, bf16* weights, float* state, int dim, Range keys, int used) {
  // Lanes of keys [i, i + 16) that are not seen become `other`.
  const auto mask = [&](F32 x, int i, float other) {
    const int first = least(kBlock, most(0, keys.first - i)), last = least(kBlock, most(0, keys.last - i));
    return Isa::keep(x, first, most(first, last), other);
  };
  F32 top = Isa::set(-__builtin_inff());
  for (int i = 0; i < used; i += kBlock) {
    top = Isa::max(top, mask(Isa::load(scores + i), i, -__builtin_inff()));
  }
  const float maximum = Isa::largest(top);
  F32 total = Isa::zero();
  for (int i = 0; i < used; i += kBlock) {
    const F32 e = exponential(Isa::sub(Isa::load(scores + i), Isa::set(maximum)));
    const F32 kept = mask(e, i, 0.0f);
    total = Isa::add(total, kept);
    Isa::store_bf16(weights + i, kept);
  }
  state[dim] = maximum;
  state[dim + 1] = Isa::sum(total);
  return keys.first < keys.last;
}

// One key block for all rows of a tile and one KV head: scores, softmax, weighted values into s.current.
// Row i of the tile is query i / group, head i % group; seen[i] says whether it saw a key of this block.
static HYBRID_INLINE void attend_block(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int block,
                                       const AttentionScratch& s, bool* seen) {
  const int group = args.heads / args.kv_heads, rows = tile.rows * group, key0 = block * kKeys;
  const KvLayout& kv = args.kv;
  const int end = least(kKeys, tile.position + tile.rows - key0);  // keys that the last query sees
  const int used = (end + kBlock - 1) / kBlock * kBlock;
  const Blocks keys{key_at(kv, tile.slot, kv_head, key0), int64_t(kv.key_dim) / 2 * kLine, kLine, kv.key_dim / 2};
  const Blocks values{value_at(kv, tile.slot, kv_head, key0), kLine, int64_t(kv.value_dim) * 4, used / 2};
  // While scores are computed this block's values are fetched, while values are summed the next block's keys.
  const char* next_keys = key_at(kv, tile.slot, kv_head, key0 + kKeys);
  const F32 scale = Isa::set(args.scale);
  const bf16* q = args.q + (int64_t(tile.row) * args.heads + kv_head * group) * kv.key_dim;
  small_product([&](int i) { return q + (int64_t(i / group) * args.heads + i % group) * kv.key_dim; }, rows, keys,
                used / kBlock, values.data,
                [&](F32 acc, int row, int column) {
                  Isa::store(s.scores + row * kKeys + column * kBlock, Isa::mul(acc, scale));
                });
  for (int i = 0; i < rows; ++i)
    seen[i] = softmax(s.scores + i * kKeys, s.weights + i * kKeys, s.current + i * s.state_stride, kv.value_dim,
                      visible(args, tile.position + i / group, block), used);
  small_product(
      [&](int i) { return s.weights + i * kKeys; }, rows, values, kv.value_dim / kBlock, next_keys,
      [&](F32 acc, int row, int column) { Isa::store(s.current + row * s.state_stride + column * kBlock, acc); });
}

static HYBRID_INLINE void copy_state(float* into, const float* from, int dim) {
  __builtin_memcpy(into, from, (dim + 2) * sizeof(float));
}

// All visible blocks of a tile, joined as they come.
static HYBRID_INLINE void attend_tile(const AttentionArgs& args, const AttentionTile& tile, int kv_head,
                                      char* scratch) {
  const int group = args.heads / args.kv_heads, rows = tile.rows * group, dim = args.kv.value_dim;
  const AttentionScratch s = carve(scratch, rows, dim);
  bool started[kMaxTileRows] = {}, seen[kMaxTileRows];
  const int first = first_block(args, tile.position);
  for (int block = first; block * kKeys < tile.position + tile.rows; ++block) {
    attend_block(args, tile, kv_head, block, s, seen);
    for (int i = 0; i < rows; ++i) {
      if (!seen[i]) continue;
      float* joined = s.joined + i * s.state_stride;
      const float* current = s.current + i * s.state_stride;
      if (started[i])
        join(joined, current, dim);
      else
        copy_state(joined, current, dim);
      started[i] = true;
    }
  }
  for (int i = 0; i < rows; ++i) {
    bf16* out = args.output + int64_t(tile.row + i / group) * args.output_stride +
                (kv_head * group + i % group) * args.head_dim;
    finish(out, s.joined + i * s.state_stride, dim, args.head_dim);
  }
}

// The partial state of one head and block of a split tile.
static HYBRID_INLINE float* partial(const AttentionArgs& args, const AttentionTile& tile, int head, int block) {
  const int blocks = (tile.position + kKeys) / kKeys;
  return args.states + (tile.state * args.heads + int64_t(head) * blocks + block) * (args.kv.value_dim + kBlock);
}

// One key block of a decode row, left for `merge`.
static HYBRID_INLINE void attend_part(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int block,
                                      char* scratch) {
  const int group = args.heads / args.kv_heads, dim = args.kv.value_dim;
  if (block < first_block(args, tile.position)) return;
  const AttentionScratch s = carve(scratch, group, dim);
  bool seen[kMaxTileRows];
  attend_block(args, tile, kv_head, block, s, seen);
  for (int i = 0; i < group; ++i)
    copy_state(partial(args, tile, kv_head * group + i, block), s.current + i * s.state_stride, dim);
}

static void attention(const AttentionArgs& args, const Step& step, const Work& work) {
  const int total = step.attention_tasks * args.kv_heads;
  int index = 0;  // tasks ascend, so the tile search goes on from where it was
  for (int task = take(work); task < total; task = take(work)) {
    const int kv_head = task % args.kv_heads, part = task / args.kv_heads;
    while (index + 1 < step.tile_count && step.tiles[index + 1].task <= part) ++index;
    const AttentionTile& tile = step.tiles[index];
    if (tile.split)
      attend_part(args, tile, kv_head, part - tile.task, work.scratch);
    else
      attend_tile(args, tile, kv_head, work.scratch);
  }
}

static void merge(const AttentionArgs& args, const Step& step, const Work& work) {
  const int dim = args.kv.value_dim;
  const Range tasks = share(step.split_tiles * args.heads, work);
  int index = -1, found = -1;
  for (int task = tasks.first; task < tasks.last; ++task) {
    const int wanted = task / args.heads, head = task % args.heads;
    while (found < wanted) found += step.tiles[++index].split;
    const AttentionTile& tile = step.tiles[index];
    const int first = first_block(args, tile.position);
    float* state = partial(args, tile, head, first);
    for (int block = first + 1; block * kKeys <= tile.position; ++block)
      join(state, partial(args, tile, head, block), dim);
    finish(args.output + int64_t(tile.row) * args.output_stride + head * args.head_dim, state, dim, args.head_dim);
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
