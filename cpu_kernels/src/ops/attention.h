// Causal attention over the KV arena, in blocks of kKeys keys.
//
// Every key block gives a softmax of its own (maximum, denominator, weighted values); blocks are joined in ascending
// order by log-sum-exp. Prefill joins as it goes, decode computes blocks in parallel and joins afterwards: the same
// arithmetic either way, so a token's result does not depend on how its prompt was cut or on the number of threads.
#pragma once

#include "ops/gather.h"
#include "ops/seen.h"
#include "ops/turned_product.h"

namespace hybrid {
namespace HYBRID_ISA {

// A softmax over some keys: value_dim weighted sums, then the maximum score, then the denominator.
static HYBRID_INLINE void join_states(float* into, const float* from, int dim) {
  const float top = into[dim] > from[dim] ? into[dim] : from[dim];
  const float keep = exponential(into[dim] - top), more = exponential(from[dim] - top);
  for (int i = 0; i < dim; i += kBlock)
    Isa::store(into + i, Isa::fma(Isa::load(from + i), Isa::set(more), Isa::mul(Isa::load(into + i), Isa::set(keep))));
  into[dim] = top;
  into[dim + 1] = into[dim + 1] * keep + from[dim + 1] * more;
}

// The state of a row as its result. sink: null, or a logit that has no value but shares in the softmax.
static HYBRID_INLINE void finish(bf16* out, const float* state, int dim, int head_dim, const float* sink) {
  float factor = 1.0f / state[dim + 1];
  if (sink) {
    const float top = state[dim] > *sink ? state[dim] : *sink, keep = exponential(state[dim] - top);
    factor = keep / (state[dim + 1] * keep + exponential(*sink - top));
  }
  const F32 scale = Isa::set(factor);
  for (int i = 0; i < head_dim; i += kBlock)
    store_some_bf16(out + i, Isa::mul(Isa::load(state + i), scale), min(kBlock, head_dim - i));
}

struct AttentionScratch {
  float* scores;   // [rows, kKeys]
  bf16* weights;   // [rows, kKeys]
  float* current;  // [rows, value_dim + 16]: this block's state
  float* joined;   // [rows, value_dim + 16]: all blocks so far
  char* opened;    // some blocks of keys or values as bf16; if these are shared, all values, then keys
  int state_stride;
};

static HYBRID_INLINE AttentionScratch carve(char* scratch, int rows, int value_dim) {
  const AttentionOffsets at = attention_offsets(rows, value_dim);
  AttentionScratch s;
  s.state_stride = value_dim + kBlock;
  s.scores = reinterpret_cast<float*>(scratch);
  s.current = reinterpret_cast<float*>(scratch + at.current);
  s.joined = reinterpret_cast<float*>(scratch + at.joined);
  s.weights = reinterpret_cast<bf16*>(scratch + at.weights);
  s.opened = scratch + at.opened;
  return s;
}

// Scores are in units of log 2, which spares the softmax a product for each; a cap is put on them before.
constexpr float kLog2E = 1.44269504f, kLog2 = 0.693147181f;

static HYBRID_INLINE float score_scale(const AttentionArgs& args) {
  return args.score_cap == 0 ? args.scale * kLog2E : args.scale;
}

// What scores and weights of one key block are multiplied by; unused where keys and values have no scales.
struct BlockScales {
  float keys[kKeys], values[kKeys];
};

template <class Kv>
static HYBRID_INLINE void load_scales(const AttentionArgs& args, const float* keys, const float* values, int used,
                                      BlockScales& scales) {
  for (int i = 0; i < used; i += kBlock) {
    Isa::store(scales.keys + i, Isa::mul(Isa::load(keys + i), Isa::set(score_scale(args) * Kv::unit)));
    Isa::store(scales.values + i, Isa::mul(Isa::load(values + i), Isa::set(Kv::unit)));
  }
}

// Scores of a row to weights; the maximum and the denominator go into its state. value_scales: null, or a factor of
// each weight, of which the denominator knows nothing. mask(x, i, other): lanes of keys [i, i + 16) that are not seen
// become `other`.
template <class Mask>
static HYBRID_INLINE void weigh(const float* scores, const float* value_scales, bf16* weights, float* state, int dim,
                                int used, Mask mask) {
  F32 top = Isa::set(-__builtin_inff());
  for (int i = 0; i < used; i += kBlock) top = Isa::max(top, mask(Isa::load(scores + i), i, -__builtin_inff()));
  const float maximum = Isa::max_lane(top);
  F32 total = Isa::zero();
  for (int i = 0; i < used; i += kBlock) {
    const F32 e = power_of_two(Isa::sub(Isa::load(scores + i), Isa::set(maximum)));
    const F32 kept = mask(e, i, 0.0f);
    total = Isa::add(total, kept);
    // Masked again: what was never written may have any scale.
    Isa::store_bf16(weights + i, value_scales ? mask(Isa::mul(kept, Isa::load(value_scales + i)), i, 0.0f) : kept);
  }
  state[dim] = maximum * kLog2;
  state[dim + 1] = Isa::sum(total);
}

// False if the row sees no key here.
static HYBRID_INLINE bool softmax(const float* scores, const float* value_scales, bf16* weights, float* state, int dim,
                                  Range keys, int used) {
  if (keys.first <= 0 && used <= keys.last) {
    weigh(scores, value_scales, weights, state, dim, used, [](F32 x, int, float) { return x; });
    return true;
  }
  weigh(scores, value_scales, weights, state, dim, used, [&](F32 x, int i, float other) {
    if (keys.first <= i && i + kBlock <= keys.last) return x;
    const int first = min(kBlock, max(0, keys.first - i)), last = min(kBlock, max(0, keys.last - i));
    return Isa::keep(x, first, max(first, last), other);
  });
  return keys.first < keys.last;
}

// Scores [rows, kKeys] of `used` keys, between bounds, in units of log 2.
static HYBRID_KERNEL void cap_scores(float* scores, int rows, int used, float cap) {
  for (int row = 0; row < rows; ++row, scores += kKeys)
    for (int i = 0; i < used; i += kBlock)
      Isa::store(scores + i, Isa::mul(capped(Isa::load(scores + i), cap), Isa::set(kLog2E)));
}

// One key block of one KV head of a tile.
struct Place {
  const AttentionTile* tile;
  int kv_head, block;
};

template <class Kv>
static HYBRID_INLINE const char* keys_of(const AttentionArgs& args, const Place& at) {
  return key_at<Kv>(args.kv, at.tile->sequence, at.kv_head, at.block * kKeys);
}

template <class Kv>
static HYBRID_INLINE void fetch_scales(const AttentionArgs& args, const Place& at) {
  if constexpr (!Kv::scaled) return;
  const float* keys = key_scale(args.kv, at.tile->sequence, at.kv_head, at.block * kKeys);
  const float* values = value_scale(args.kv, at.tile->sequence, at.kv_head, at.block * kKeys);
  for (int i = 0; i < kKeys; i += kBlock) {
    __builtin_prefetch(keys + i, 0, 2);
    __builtin_prefetch(values + i, 0, 2);
  }
}

// A key block as operands: its lines of keys and of values, how many there are in a block of 16, and what is fetched
// while each are multiplied.
struct KeyBlock {
  Lines keys, values;
  int key_lines, value_lines;
  const char *after_keys, *after_values;
};

// Keys and values as they are stored. While scores are computed the values are fetched, while values are summed the
// keys of `next`.
template <class Kv>
static HYBRID_INLINE KeyBlock stored_block(const AttentionArgs& args, const Place& at, const Place& next, int used) {
  const KvLayout& kv = args.kv;
  const char* const values = value_at<Kv>(kv, at.tile->sequence, at.kv_head, at.block * kKeys);
  return {{keys_of<Kv>(args, at), token_bytes<Kv>(kv.key_dim) * kBlock, kLine, nullptr, 0},
          {values, kLine, token_bytes<Kv>(kv.value_dim) * Kv::line_inputs, nullptr, 0},
          kv.key_dim / Kv::line_inputs,
          used / Kv::line_inputs,
          values,
          keys_of<Kv>(args, next)};
}

// Of shared keys the values are made in scratch while scores are computed, and the keys of `next` are fetched then.
template <class Kv>
static HYBRID_INLINE KeyBlock turned_block(const AttentionArgs& args, const Place& at, const Place& next, int used,
                                           const char* scratch) {
  KeyBlock found = stored_block<Kv>(args, at, next, used);
  found.values = {scratch, kTurnedBytes, kLine, nullptr, 0};
  found.value_lines = used / 2;
  found.after_keys = found.after_values;
  found.after_values = scratch;
  return found;
}

// One key block for all rows of a tile and one KV head: scores, softmax, weighted values into s.current. Row i of the
// tile is query i / group, head i % group; seen[i] says whether it saw a key of this block. Meanwhile the keys of
// `next` are fetched.
template <class Kv, bool shared>
static HYBRID_KERNEL void attend_block(const Tiles<Bf16>& tiles, const AttentionArgs& args, const Place& at,
                                       const Place& next, const AttentionScratch& s, bool* seen) {
  const AttentionTile& tile = *at.tile;
  const int group = args.heads / args.kv_heads, rows = tile.rows * group, key0 = at.block * kKeys;
  const KvLayout& kv = args.kv;
  const int end = min(kKeys, end_of(args, tile, tile.rows - 1) - key0);  // keys that the last query sees
  const int used = (end + kBlock - 1) / kBlock * kBlock;
  using Values = typename Either<shared, Bf16, Kv>::Type;
  const KeyBlock keys =
      shared ? turned_block<Kv>(args, at, next, used, s.opened) : stored_block<Kv>(args, at, next, used);
  BlockScales scales;
  if constexpr (Kv::scaled)
    load_scales<Kv>(args, key_scale(kv, tile.sequence, at.kv_head, key0),
                    value_scale(kv, tile.sequence, at.kv_head, key0), used, scales);
  fetch_scales<Kv>(args, next);
  const F32 scale = Isa::set(score_scale(args));
  const bf16* q = args.q + (int64_t(tile.row) * args.heads + at.kv_head * group) * kv.key_dim;
  const bf16* queries[kMaxTileRows];
  for (int i = 0; i < rows; ++i) queries[i] = q + (int64_t(i / group) * args.heads + i % group) * kv.key_dim;
  const auto query = [&](int i) { return queries[i]; };
  const auto keep = [&](F32 acc, int row, int column) {
    const F32 factor = Kv::scaled ? Isa::load(scales.keys + column * kBlock) : scale;
    Isa::store(s.scores + row * kKeys + column * kBlock, Isa::mul(acc, factor));
  };
  if constexpr (shared)
    turned_product<Kv>(tiles, query, rows, keys.keys, kv.key_dim / 2, used / kBlock,
                       {s.opened + turned_bytes(kv), s.opened, kv.value_dim / 2}, keys.after_keys, keep);
  else
    small_product<Kv>(tiles, query, rows, keys.keys, keys.key_lines, used / kBlock, keys.after_keys, s.opened, keep);
  if (args.score_cap != 0) cap_scores(s.scores, rows, used, args.score_cap);
  for (int i = 0; i < rows; ++i)
    seen[i] = softmax(s.scores + i * kKeys, Kv::scaled ? scales.values : nullptr, s.weights + i * kKeys,
                      s.current + i * s.state_stride, kv.value_dim,
                      visible(args, tile, i / group, at.kv_head, at.block), used);
  small_product<Values>(
      tiles, [&](int i) { return s.weights + i * kKeys; }, rows, keys.values, keys.value_lines, kv.value_dim / kBlock,
      keys.after_values, s.opened,
      [&](F32 acc, int row, int column) { Isa::store(s.current + row * s.state_stride + column * kBlock, acc); });
}

static HYBRID_INLINE void copy_state(float* into, const float* from, int dim) {
  __builtin_memcpy(into, from, (dim + 2) * sizeof(float));
}

// The end of a row and head: its result, or its state. state: null if it saw no key; then no values are left.
static HYBRID_INLINE void leave(const AttentionArgs& args, int row, int head, const float* state) {
  const int dim = args.kv.value_dim;
  if (!args.partials) {
    const int apart = args.output_head_stride ? args.output_head_stride : args.head_dim;
    bf16* out = args.output + int64_t(row) * args.output_stride + head * apart;
    return finish(out, state, dim, args.head_dim, args.sinks ? args.sinks + head : nullptr);
  }
  float* into = args.partials + (int64_t(row) * args.heads + head) * (dim + kBlock);
  if (state) return copy_state(into, state, dim);
  into[dim] = -__builtin_inff();
  into[dim + 1] = 0.0f;
}

// All blocks of a tile from `at` on, joined as they come. attend(place, next, scratch, seen) does one as attend_block()
// does; `next` is what this thread does afterwards.
template <class Attend>
static HYBRID_INLINE void join_blocks(const AttentionArgs& args, Place at, const Place& next, char* scratch,
                                      Attend attend) {
  const AttentionTile& tile = *at.tile;
  const int group = args.heads / args.kv_heads, rows = tile.rows * group, dim = args.kv.value_dim;
  const AttentionScratch s = carve(scratch, rows, dim);
  bool started[kMaxTileRows] = {}, seen[kMaxTileRows];
  const int blocks = (end_of(args, tile, tile.rows - 1) + kKeys - 1) / kKeys;
  const auto from = [&](int block) { return next_seen(args, tile, at.kv_head, block, blocks); };
  for (int after = 0; (at.block = from(at.block)) < blocks; at.block = after) {
    after = from(at.block + 1);
    attend(at, after < blocks ? Place{at.tile, at.kv_head, after} : next, s, seen);
    for (int i = 0; i < rows; ++i) {
      if (!seen[i]) continue;
      float* joined = s.joined + i * s.state_stride;
      const float* current = s.current + i * s.state_stride;
      if (started[i])
        join_states(joined, current, dim);
      else
        copy_state(joined, current, dim);
      started[i] = true;
    }
  }
  for (int i = 0; i < rows; ++i) {
    const float* state = started[i] ? s.joined + i * s.state_stride : nullptr;
    leave(args, tile.row + i / group, at.kv_head * group + i % group, state);
  }
}

// attend_block() of the keys that the row of a tile selected.
template <class Kv, bool shared>
static HYBRID_INLINE void attend_selected(const Tiles<Bf16>& tiles, const AttentionArgs& args, const Place& at,
                                          AttentionScratch s, bool* seen) {
  Gathered found;
  gather<Kv, shared>(args, *at.tile, at.kv_head, at.block, s.opened, found);
  s.opened += gathered_offsets(args.kv).end;
  const Place place{&found.tile, at.kv_head, 0};
  attend_block<Kv, shared>(tiles, found.args, place, place, s, seen);
}

// Rows of a tile that see all keys before them together, others one by one.
template <class Kv, bool shared>
static HYBRID_INLINE void attend_tile(const Tiles<Bf16>& tiles, const AttentionArgs& args, const Place& at,
                                      const Place& next, char* scratch) {
  AttentionTile part = *at.tile;
  while (part.rows > 0 && selects(args, part, part.rows - 1)) --part.rows;
  if (part.rows > 0) {
    const auto attend = [&](const Place& place, const Place& after, const AttentionScratch& s, bool* seen) {
      attend_block<Kv, shared>(tiles, args, place, after, s, seen);
    };
    join_blocks(args, {&part, at.kv_head, at.block}, next, scratch, attend);
  }
  const int last = at.tile->row + at.tile->rows;
  for (part.row += part.rows, part.position += part.rows, part.rows = 1; part.row < last; ++part.row, ++part.position)
    join_blocks(args, {&part, at.kv_head, 0}, next, scratch,
                [&](const Place& place, const Place&, const AttentionScratch& s, bool* seen) {
                  attend_selected<Kv, shared>(tiles, args, place, s, seen);
                });
}

// The partial state of one head and block of a split tile.
static HYBRID_INLINE float* partial(const AttentionArgs& args, const AttentionTile& tile, int head, int block) {
  const int blocks = (tile.position + kKeys) / kKeys;
  return args.states + (tile.state * args.heads + int64_t(head) * blocks + block) * (args.kv.value_dim + kBlock);
}

// One key block of a decode row, left for `merge`.
template <class Kv, bool shared>
static HYBRID_INLINE void attend_part(const Tiles<Bf16>& tiles, const AttentionArgs& args, const Place& at,
                                      const Place& next, char* scratch) {
  const int group = args.heads / args.kv_heads, dim = args.kv.value_dim;
  if (at.block < first_block(args, at.tile->position) || at.block * kKeys >= end_of(args, *at.tile, 0)) return;
  if (!halves(args, *at.tile, 0, at.kv_head, at.block)) return;
  AttentionScratch s = carve(scratch, group, dim);
  s.current = partial(args, *at.tile, at.kv_head * group, at.block);
  s.state_stride = (at.tile->position + kKeys) / kKeys * (dim + kBlock);
  bool seen[kMaxTileRows];
  if (selects(args, *at.tile, 0)) return attend_selected<Kv, shared>(tiles, args, at, s, seen);
  attend_block<Kv, shared>(tiles, args, at, next, s, seen);
}

// Task `task` of the step, not before `tile`: the first block of a tile and KV head, or any block of a split tile, of
// which those of a head follow each other.
static HYBRID_INLINE Place place_of(const AttentionArgs& args, const Step& step, int task, const AttentionTile* tile) {
  const AttentionTile* const last = step.tiles + step.tile_count - 1;
  while (tile < last && tile[1].task * args.kv_heads <= task) ++tile;
  const int parts = tile->split ? (tile->position + kKeys) / kKeys : 1, index = task - tile->task * args.kv_heads;
  return {tile, index / parts, tile->split ? index % parts : first_block(args, tile->position)};
}

// Threads take runs of tasks: what follows a block in memory is fetched while that is computed, into the right cache.
template <class Kv, bool shared>
static HYBRID_KERNEL void attend(const AttentionArgs& args, const Step& step, const Work& work) {
  const Tiles<Bf16> tiles(Bf16{}, step, kMaxTileRows);
  for_shares(step.attention_tasks * args.kv_heads, 1, work, [&](Range run) {
    Place at = place_of(args, step, run.first, step.tiles);
    for (int task = run.first; task < run.last; ++task) {
      const Place next = task + 1 < run.last ? place_of(args, step, task + 1, at.tile) : at;
      if (at.tile->split)
        attend_part<Kv, shared>(tiles, args, at, next, work.scratch);
      else
        attend_tile<Kv, shared>(tiles, args, at, next, work.scratch);
      at = next;
    }
  });
}

template <class Kv>
static HYBRID_KERNEL void attend_seen(const AttentionArgs& args, const Step& step, const Work& work);

static void attention(const AttentionArgs& args, const Step& step, const Work& work) {
  with_kv_format(args.kv.format, [&](auto kv) {
    if (args.fresh) return attend_seen<decltype(kv)>(args, step, work);
    if (args.kv.shared) return attend<decltype(kv), true>(args, step, work);
    attend<decltype(kv), false>(args, step, work);
  });
}

static void merge(const MergeArgs& merged, const Step& step, const Work& work) {
  const AttentionArgs& args = merged.attention;
  const int dim = args.kv.value_dim;
  int index = -1, found = -1;
  for_each(step.split_tiles * args.heads, 1, work, [&](int task) {
    const int wanted = task / args.heads, head = task % args.heads;
    while (found < wanted) found += step.tiles[++index].split;
    const AttentionTile& tile = step.tiles[index];
    const int first = first_block(args, tile.position), end = end_of(args, tile, 0);
    const int blocks = (end + kKeys - 1) / kKeys, kv_head = head / (args.heads / args.kv_heads);
    const auto from = [&](int block) { return next_seen(args, tile, kv_head, block, blocks); };
    int block = from(first);
    float* state = block < blocks ? partial(args, tile, head, block) : nullptr;
    while ((block = from(block + 1)) < blocks) join_states(state, partial(args, tile, head, block), dim);
    leave(args, tile.row, head, state);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
