// Entries that stand for several tokens: how they are made, what each is worth to a row, and which a row sees.
#pragma once

#include "ops/index.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kScoreRows = 8;  // rows of a step for which entries are brought together once

// What a token brings to an entry: in each dimension a value, a gate, and what is added to that; null: no gates.
struct Brought {
  const float *values, *gates, *bias;
};

// What the last tokens of a sequence brought.
static HYBRID_INLINE float* tail_of(const KvLayout& kv, int sequence) {
  return reinterpret_cast<float*>(kv_head(kv, sequence, 0) + kv.tail_offset);
}

// The row of `made` that is `back` tokens before `row` in its sequence: of this step or, if it is older, as it was
// kept.
static HYBRID_INLINE const float* row_before(const CompressArgs& args, const Step& step, int row, int back) {
  const int before = row - back, sequence = step.sequences[row];
  if (before >= 0 && step.sequences[before] == sequence) return args.made + int64_t(before) * args.width;
  const int kept = (step.positions[row] - back) % args.tokens;
  return tail_of(args.kv, sequence) + int64_t(kept) * args.width;
}

// All that goes into the entry that `row` makes, in the order of tokens; returns how much.
static HYBRID_INLINE int all_brought(const CompressArgs& args, const Step& step, int row, Brought* found) {
  const int rate = args.rate, sets = args.overlaps ? 2 : 1;
  const int tokens = step.positions[row] >= rate ? sets * rate : rate;  // before the first window there is none
  for (int i = 0; i < tokens; ++i) {
    const int back = tokens - 1 - i, at = (args.overlaps && back < rate ? 1 : 0) * args.dim;
    const float* made = row_before(args, step, row, back) + at;
    found[i] = {made + args.first_value, made + args.first_gate,
                args.bias ? args.bias + (i % rate) * sets * args.dim + at : nullptr};
  }
  return tokens;
}

// Up to 16 dimensions of an entry.
static HYBRID_INLINE F32 weighted(const Brought* tokens, int count, int i, int some) {
  const auto gate = [&](const Brought& token) {
    if (!token.bias) return Isa::zero();
    return Isa::add(load_some(token.gates + i, some), load_some(token.bias + i, some));
  };
  F32 top = gate(tokens[0]), total = Isa::zero(), sum = Isa::zero();
  for (int t = 1; t < count; ++t) top = Isa::max(top, gate(tokens[t]));
  for (int t = 0; t < count; ++t) {
    const F32 weight = exponential(Isa::sub(gate(tokens[t]), top));
    total = Isa::add(total, weight);
    sum = Isa::fma(weight, load_some(tokens[t].values + i, some), sum);
  }
  return Isa::div(sum, total);
}

template <class Kv>
static HYBRID_INLINE void store_entry(char* out, const float* x, int padded_dim) {
  if constexpr (Kv::scaled) {
    const float scale = encode<Kv>(out, x, padded_dim);
    __builtin_memcpy(out + padded_dim, &scale, sizeof scale);
  } else {
    to_bf16(reinterpret_cast<bf16*>(out), x, padded_dim);
  }
}

template <class Kv>
static HYBRID_KERNEL void compress_rows(const CompressArgs& args, const Step& step, const Work& work) {
  Brought tokens[kMaxCompressed];
  alignas(64) float x[kMaxHeadDim];
  for_each(step.rows, 1, work, [&](int row) {
    const int position = step.positions[row], dim = args.dim;
    if ((position + 1) % args.rate) return;
    const int count = all_brought(args, step, row, tokens);
    for (int i = 0; i < dim; i += kBlock) {
      const int some = min(kBlock, dim - i);
      store_some(x + i, weighted(tokens, count, i, some), some);
    }
    if (args.norm) normalise(x, inverse_rms(x, dim, args.eps), args.norm, dim);
    rotate(x + (args.turns_first ? 0 : dim - args.rope_dim), args.rope + int64_t(row) * args.rope_dim, args.rope_dim,
           args.interleaved);
    mark_unsound(x, dim);
    const int padded = args.indexes ? args.kv.index_dim : args.kv.key_dim, number = position / args.rate;
    __builtin_memset(x + dim, 0, size_t(padded - dim) * sizeof(float));
    char* const sequence = kv_head(args.kv, step.sequences[row], 0);
    if (args.indexes)
      return store_entry<KvBf16>(sequence + args.kv.index_offset + number * token_bytes<KvBf16>(padded), x, padded);
    store_entry<Kv>(sequence + args.kv.entry_offset + number * args.kv.entry_bytes, x, padded);
  });
}

static void compress(const CompressArgs& args, const Step& step, const Work& work) {
  with_kv_format(args.kv.format, [&](auto kv) { compress_rows<decltype(kv)>(args, step, work); });
}

static void keep(const KeepArgs& args, const Step& step, const Work& work) {
  const int64_t size = args.width ? args.width * int64_t(sizeof(float)) : args.kv.entry_bytes;
  const int64_t start = args.width ? args.kv.tail_offset : 0;
  for_each(step.rows, 1, work, [&](int row) {
    const int later = row + args.tokens, sequence = step.sequences[row];
    if (later < step.rows && step.sequences[later] == sequence) return;
    char* const kept = kv_head(args.kv, sequence, 0) + start;
    __builtin_memcpy(kept + step.positions[row] % args.tokens * size, args.made + row * size, size_t(size));
  });
}

// Entries that the last token of a row's sequence may see.
static HYBRID_INLINE int entries_at(int position, int rate) { return rate ? (position + 1) / rate : 0; }

// Key blocks of the entries of the longest sequence of a step: so many a row has among the scores.
static HYBRID_INLINE int entry_blocks(const Step& step, int rate) {
  int most = 0;
  for (int row = 0; row < step.rows; ++row) most = max(most, entries_at(step.positions[row], rate));
  return (most + kKeys - 1) / kKeys;
}

// Some entries of one sequence, side by side as keys; what pads the last 16 is zero.
struct GatheredEntries {
  char* keys;
  int sequence, count;
};

// Sees to it that the first `wanted` entries of a key block are there.
static HYBRID_INLINE void gather_entries(const EntryScoresArgs& args, int sequence, int first, int wanted,
                                         GatheredEntries& into) {
  KvLayout layout{};
  layout.base = into.keys;
  layout.key_dim = args.kv.index_dim;
  if (into.sequence != sequence) into = {into.keys, sequence, 0};
  const int64_t size = token_bytes<KvBf16>(layout.key_dim);
  const char* from = kv_head(args.kv, sequence, 0) + args.kv.index_offset + (first + into.count) * size;
  for (; into.count < wanted; ++into.count, from += size) {
    char* to = key_at<KvBf16>(layout, 0, 0, into.count);
    if (into.count % kBlock == 0) __builtin_memset(to, 0, size_t(size) * kBlock);
    for (int pair = 0; pair < layout.key_dim / 2; ++pair) __builtin_memcpy(to + pair * kLine, from + pair * 4, 4);
  }
}

static void entry_scores(const EntryScoresArgs& args, const Step& step, const Work& work) {
  const Tiles<Bf16> tiles(Bf16{}, step, kMaxTileRows);
  const int blocks = entry_blocks(step, args.rate), groups = (step.rows + kScoreRows - 1) / kScoreRows;
  const int dim = args.kv.index_dim;
  char* const products = work.scratch + int64_t(kKeys) * dim * 2;
  for_each(groups * blocks, 1, work, [&](int task) {
    const int block = task % blocks, first = block * kKeys, row0 = task / blocks * kScoreRows;
    GatheredEntries found{work.scratch, -1, 0};
    for (int row = row0; row < min(step.rows, row0 + kScoreRows); ++row) {
      const int entries = entries_at(step.positions[row], args.rate), count = min(kKeys, entries - first);
      if (entries <= args.selects || count <= 0) continue;
      gather_entries(args, step.sequences[row], first, count, found);
      const float* weights = args.weights ? args.weights + int64_t(row) * args.heads : nullptr;
      score_keys(tiles, args.q + int64_t(row) * args.heads * dim, weights, args.heads, dim, found.keys,
                 (count + kBlock - 1) / kBlock, found.keys, products,
                 args.scores + (int64_t(row) * blocks + block) * kKeys);
    }
  });
}

// Numbers of the entries that a row sees, ascending, and how many there are.
template <class Args>
static HYBRID_INLINE int seen_entries(const Args& args, int row, int entries, const float* scores, int32_t* into) {
  const bool some = args.selects && entries > args.selects;
  if (some && __builtin_isfinite(largest_magnitude(scores, entries))) {
    select_largest(scores, entries, args.selects, into);
    return args.selects;
  }
  if (some) __builtin_memset(args.q + int64_t(row) * args.query_stride, 0xff, size_t(args.query_stride) * sizeof(bf16));
  const int count = some ? args.selects : entries;
  for (int i = 0; i < count; ++i) into[i] = i;
  return count;
}

static void see(const SeeArgs& args, const Step& step, const Work& work) {
  const int64_t stride = int64_t(entry_blocks(step, args.rate)) * kKeys;
  for_each(step.rows, 1, work, [&](int row) {
    const int end = step.positions[row] + 1, first = max(0, end - args.window);
    int32_t* seen = args.seen + int64_t(row) * args.stride;
    for (int position = first; position < end; ++position) *seen++ = position;
    const float* scores = args.scores ? args.scores + row * stride : nullptr;
    const int count = seen_entries(args, row, entries_at(end - 1, args.rate), scores, seen);
    for (int i = 0; i < count; ++i) seen[i] = ~seen[i];
    args.counts[row] = end - first + count;
  });
}

// Numbers of pools, ascending, to the positions of their tokens, in place.
static HYBRID_INLINE void open_pools(int32_t* pools, int count, int rate) {
  for (int i = count - 1; i >= 0; --i) {
    const int first = pools[i] * rate;
    for (int token = 0; token < rate; ++token) pools[i * rate + token] = first + token;
  }
}

static void select_pools(const SelectPoolsArgs& args, const Step& step, const Work& work) {
  const int64_t stride = int64_t(entry_blocks(step, args.rate)) * kKeys;
  for_each(step.rows, 1, work, [&](int row) {
    const int end = step.positions[row] + 1, pools = entries_at(end - 1, args.rate);
    if (pools <= args.selects) {
      args.counts[row] = 0;
      return;
    }
    int32_t* selected = args.selected + int64_t(row) * args.stride;
    const int seen = seen_entries(args, row, pools, args.scores + row * stride, selected);
    open_pools(selected, seen, args.rate);
    int count = seen * args.rate;
    for (int position = pools * args.rate; position < end; ++position) selected[count++] = position;
    args.counts[row] = count;
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
