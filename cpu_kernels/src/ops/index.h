// An indexer: what each token is worth to a row, and which tokens are worth most. Attention sees no others.
#pragma once

#include "ops/qkv.h"
#include "ops/small_product.h"

namespace hybrid {
namespace HYBRID_ISA {

// The keys of an indexer as a layout of their own: bf16, one for all heads.
static HYBRID_INLINE KvLayout index_keys(KvLayout kv) {
  kv.base += kv.index_offset;
  kv.key_dim = kv.index_dim;
  return kv;
}

// What is no number in bf16 says so by NaN: an infinity could vanish where scores below zero become zero.
static HYBRID_INLINE void mark_unsound(float* x, int dim) {
  if (!is_sound(x, dim)) x[0] = __builtin_nanf("");
}

static void index(const IndexArgs& args, const Step& step, const Work& work) {
  const int tasks = args.heads + 1, dim = args.head_dim;
  const KvLayout keys = index_keys(args.kv);
  alignas(64) float x[kMaxHeadDim];
  for_each(step.rows * tasks, kHeadsAtOnce, work, [&](int task) {
    const int row = task / tasks, head = task % tasks;
    const bool is_key = head == args.heads;
    const float* from = is_key ? args.keys + int64_t(row) * args.key_stride
                               : args.queries + int64_t(row) * args.query_stride + int64_t(head) * dim;
    __builtin_memcpy(x, from, size_t(dim) * sizeof(float));
    if (is_key && args.norm_bias) {
      const float centre = mean(x, dim), scale = inverse_rms(x, dim, args.eps, centre);
      for (int i = 0; i < dim; ++i) x[i] = (x[i] - centre) * scale * args.norm[i] + args.norm_bias[i];
    } else if (const float* norm = is_key ? args.norm : args.query_norm) {
      normalise(x, inverse_rms(x, dim, args.eps), norm, dim);
    }
    rotate(x, args.rope + int64_t(row) * args.rope_dim, args.rope_dim, args.interleaved);
    mark_unsound(x, dim);
    if (is_key) return store_key<KvBf16>(keys, step.sequences[row], 0, step.positions[row], x, dim);
    bf16* q = args.q + (int64_t(row) * args.heads + head) * keys.key_dim;
    to_bf16(q, x, dim);
    __builtin_memset(q + dim, 0, size_t(keys.key_dim - dim) * sizeof(*q));
  });
}

// Key blocks of the longest sequence of a step: so many a row has among the scores.
static HYBRID_INLINE int score_blocks(const Step& step) {
  int longest = 0;
  for (int row = 0; row < step.rows; ++row) longest = max(longest, step.positions[row]);
  return longest / kKeys + 1;
}

// Queries of all heads of one row, [heads, dim], times the first `used` blocks of `keys`: [heads, kKeys], in scratch.
// after: what is fetched meanwhile.
static HYBRID_KERNEL const float* index_products(const Tiles<Bf16>& tiles, const bf16* q, int heads, int dim,
                                                 const char* keys, int used, const char* after, char* scratch) {
  const auto query = [&](int head) { return q + int64_t(head) * dim; };
  auto* const products = reinterpret_cast<float*>(scratch);
  const auto keep = [&](F32 acc, int head, int column) { Isa::store(products + head * kKeys + column * kBlock, acc); };
  const int64_t block_bytes = token_bytes<KvBf16>(dim) * kBlock;
  small_product<KvBf16>(tiles, query, heads, {keys, block_bytes, kLine, nullptr, 0}, dim / 2, used, after, nullptr,
                        keep);
  return products;
}

// The same products of the keys of a key block that a row sees.
static HYBRID_INLINE const float* block_products(const Tiles<Bf16>& tiles, const bf16* q, int heads, const KvLayout& kv,
                                                 const Step& step, int row, int block, char* scratch) {
  const int key0 = block * kKeys, used = (min(kKeys, step.positions[row] + 1 - key0) + kBlock - 1) / kBlock;
  const char* const keys = key_at<KvBf16>(kv, step.sequences[row], 0, key0);
  return index_products(tiles, q + int64_t(row) * heads * kv.key_dim, heads, kv.key_dim, keys, used,
                        keys + token_bytes<KvBf16>(kv.key_dim) * kKeys, scratch);
}

// Scores of one row for the first `used` blocks of `keys`. q: [heads, dim]. The heads are added one after the other, so
// a score does not depend on what else is computed. weights: null: all are 1. after: what is fetched meanwhile.
// scratch: [heads, kKeys] floats.
static HYBRID_INLINE void score_keys(const Tiles<Bf16>& tiles, const bf16* q, const float* weights, int heads, int dim,
                                     const char* keys, int used, const char* after, char* scratch, float* scores) {
  const float* products = index_products(tiles, q, heads, dim, keys, used, after, scratch);
  for (int i = 0; i < used * kBlock; i += kBlock) {
    F32 total = Isa::zero();
    for (int head = 0; head < heads; ++head)
      total = Isa::fma(Isa::set(weights ? weights[head] : 1.0f),
                       Isa::max(Isa::zero(), Isa::load(products + head * kKeys + i)), total);
    Isa::store(scores + i, total);
  }
}

// Scores [kKeys] of one row and key block.
static HYBRID_INLINE void score_block(const Tiles<Bf16>& tiles, const IndexScoresArgs& args, const KvLayout& kv,
                                      const Step& step, int row, int block, char* scratch, float* scores) {
  const int key0 = block * kKeys, used = (min(kKeys, step.positions[row] + 1 - key0) + kBlock - 1) / kBlock;
  const char* const keys = key_at<KvBf16>(kv, step.sequences[row], 0, key0);
  score_keys(tiles, args.q + int64_t(row) * args.heads * kv.key_dim, args.weights + int64_t(row) * args.heads,
             args.heads, kv.key_dim, keys, used, keys + token_bytes<KvBf16>(kv.key_dim) * kKeys, scratch, scores);
}

static void index_scores(const IndexScoresArgs& args, const Step& step, const Work& work) {
  const Tiles<Bf16> tiles(Bf16{}, step, kMaxTileRows);
  const KvLayout keys = index_keys(args.kv);
  const int blocks = score_blocks(step);
  for_each(step.rows * blocks, 1, work, [&](int task) {
    const int row = task / blocks, block = task % blocks, position = step.positions[row];
    if (position >= args.selects && block * kKeys <= position)
      score_block(tiles, args, keys, step, row, block, work.scratch, args.scores + int64_t(task) * kKeys);
  });
}

// A number that is larger if and only if the score is. There is no -0 among scores, and no NaN among those compared.
static HYBRID_INLINE uint32_t rank_of(float score) {
  uint32_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The positions of the `wanted` largest of `count` scores, ascending. The smallest of these is found digit by digit:
// of its first byte it is known how many scores have more, and so on.
static HYBRID_INLINE void select_largest(const float* scores, int count, int wanted, int32_t* positions) {
  uint32_t found = 0, known = 0;
  int left = wanted;  // of those that begin with what is found
  for (int shift = 24; shift >= 0; shift -= 8) {
    int with_digit[256] = {};
    for (int i = 0; i < count; ++i) {
      const uint32_t rank = rank_of(scores[i]);
      if ((rank & known) == found) ++with_digit[rank >> shift & 255];
    }
    int digit = 255;
    while (with_digit[digit] < left) left -= with_digit[digit--];
    found |= uint32_t(digit) << shift;
    known |= 255u << shift;
  }
  for (int i = 0; i < count; ++i) {
    const uint32_t rank = rank_of(scores[i]);
    if (rank > found || (rank == found && left-- > 0)) *positions++ = i;
  }
}

// Queries of a row whose scores are no numbers: none either.
static HYBRID_INLINE void spoil(bf16* q, int stride) { __builtin_memset(q, 0xff, size_t(stride) * sizeof(bf16)); }

static void select(const SelectArgs& args, const Step& step, const Work& work) {
  const int64_t stride = int64_t(score_blocks(step)) * kKeys;
  for_each(step.rows, 1, work, [&](int row) {
    const int count = step.positions[row] + 1;
    if (count <= args.selects) return;
    const float* scores = args.scores + row * stride;
    int32_t* positions = args.selected + int64_t(row) * args.selects;
    if (__builtin_isfinite(largest_magnitude(scores, count)))
      return select_largest(scores, count, args.selects, positions);
    for (int i = 0; i < args.selects; ++i) positions[i] = i;
    spoil(args.q + int64_t(row) * args.query_stride, args.query_stride);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
