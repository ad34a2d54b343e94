// After the fused projection: norm per head, rope, queries to bf16, keys and values into the KV arena.
#pragma once

#include "ops/norm.h"

namespace hybrid {
namespace HYBRID_ISA {

// Keys lie packed as weights are, 16 tokens to a block, so that scores are a product; values with the tokens in pairs.
static HYBRID_INLINE char* key_at(const KvLayout& kv, int slot, int head, int position) {
  return kv.base + slot * kv.slot_stride + head * kv.head_stride + int64_t(position / kBlock) * kv.key_dim / 2 * kLine +
         position % kBlock * 4;
}
static HYBRID_INLINE char* value_at(const KvLayout& kv, int slot, int head, int position) {
  return kv.base + slot * kv.slot_stride + head * kv.head_stride + kv.value_offset +
         int64_t(position / 2) * kv.value_dim * 4 + position % 2 * 2;
}

static HYBRID_INLINE void normalise(float* x, const float* weight, int width, float eps) {
  const float scale = inverse_rms(x, width, eps);
  for (int i = 0; i < width; ++i) x[i] = x[i] * scale * weight[i];
}

static HYBRID_INLINE void rotate(float* x, const float* table, int dim, bool interleaved) {
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    float& a = x[interleaved ? 2 * i : i];
    float& b = x[interleaved ? 2 * i + 1 : i + half];
    const float c = table[i], s = table[half + i], u = a, v = b;
    a = u * c - v * s;
    b = v * c + u * s;
  }
}

static HYBRID_INLINE void to_bf16(bf16* out, const float* x, int width) {
  for (int i = 0; i < width; i += kBlock) {
    const int count = least(kBlock, width - i);
    store_some_bf16(out + i, load_some(x + i, count), count);
  }
}

static void qkv(const QkvArgs& args, const Step& step, const Work& work) {
  const int per_row = args.heads + 2 * args.kv_heads, dim = args.head_dim;
  const Range tasks = share(step.rows * per_row, work);
  alignas(64) float x[kMaxHeadDim];
  alignas(64) bf16 bits[kMaxHeadDim];
  for (int task = tasks.first; task < tasks.last; ++task) {
    const int row = task / per_row, head = task % per_row;
    const bool is_query = head < args.heads, is_key = !is_query && head < args.heads + args.kv_heads;
    const int slot = step.slots[row], position = step.positions[row];
    __builtin_memcpy(x, args.qkv + int64_t(row) * args.qkv_stride + head * dim, dim * sizeof(float));
    if (is_query || is_key) {
      const float* weight = is_query ? args.q_norm : args.k_norm;
      if (weight) normalise(x, weight, dim, args.eps);
      if (args.rope_dim) rotate(x, args.rope + int64_t(row) * args.rope_dim, args.rope_dim, args.interleaved);
    }
    if (is_query) {
      to_bf16(args.q + (int64_t(row) * args.heads + head) * args.kv.key_dim, x, dim);
      continue;
    }
    to_bf16(bits, x, dim);
    if (is_key) {
      char* out = key_at(args.kv, slot, head - args.heads, position);
      for (int i = 0; i < dim; i += 2) __builtin_memcpy(out + int64_t(i / 2) * kLine, bits + i, 4);
    } else {
      char* out = value_at(args.kv, slot, head - args.heads - args.kv_heads, position);
      for (int i = 0; i < dim; ++i) __builtin_memcpy(out + i * 4, bits + i, 2);
    }
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
