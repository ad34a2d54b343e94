// After the fused projection: norm per head, rope, queries to bf16, keys and values into the KV arena.
#pragma once

#include "ops/kv.h"
#include "ops/norm.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kHeadsAtOnce = 4;

static HYBRID_INLINE void normalise(float* x, float scale, const float* weight, int width) {
  for (int i = 0; i < width; ++i) x[i] = x[i] * scale * weight[i];
}

static HYBRID_INLINE void layer_norm(float* x, const float* weight, int width, float eps) {
  const float centre = mean(x, width), scale = inverse_rms(x, width, eps, centre);
  for (int i = 0; i < width; ++i) x[i] = (x[i] - centre) * scale * weight[i];
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

// What queries at a position are multiplied by: steps of a logarithm, one every growth_length positions.
template <class Args>
static HYBRID_INLINE float growth_at(const Args& args, int position) {
  if (args.growth == 0) return 1;
  return float(1 + double(args.growth) * __builtin_log(double(1 + position / args.growth_length)));
}

static HYBRID_INLINE void multiply(float* x, float factor, int width) {
  for (int i = 0; i < width; ++i) x[i] *= factor;
}

constexpr float kMaxBf16 = 3.3895314e38f;

// Whether x [dim] are numbers, in bf16 too.
static HYBRID_INLINE bool is_sound(const float* x, int dim) { return largest_magnitude(x, dim) <= kMaxBf16; }

// Whether a value [dim] is a number as it is stored.
static HYBRID_INLINE bool is_sound_value(const QkvArgs& args, const float* x) {
  if (!is_sound(x, args.value_width())) return false;
  return !args.norm_values || __builtin_isfinite(inverse_rms(x, args.value_width(), args.eps));
}

template <class Kv>
static HYBRID_KERNEL void qkv_rows(const QkvArgs& args, const Step& step, const Work& work) {
  const int per_row = args.heads + 2 * args.kv_heads, key_dim = args.head_dim, value_dim = args.value_width();
  const int before_values = args.heads + (args.keys_are_values ? 0 : args.kv_heads);  // heads
  alignas(64) float x[kMaxHeadDim];
  for_each(step.rows * per_row, kHeadsAtOnce, work, [&](int task) {
    const int row = task / per_row, head = task % per_row;
    const bool is_query = head < args.heads, is_key = !is_query && head < args.heads + args.kv_heads;
    const int sequence = step.sequences[row], position = step.positions[row];
    const int dim = is_query || is_key ? key_dim : value_dim;
    const float* queries = args.qkv + int64_t(row) * args.qkv_stride;
    const float* all = queries + (args.gated ? args.heads * key_dim : 0);  // as if no gates were among them
    const float* values = all + before_values * key_dim;
    const float* source = is_query || is_key ? all + head * dim : values + (head - args.heads - args.kv_heads) * dim;
    __builtin_memcpy(x, is_query && args.gated ? queries + 2 * head * dim : source, dim * sizeof(float));
    if (is_query || is_key) {
      const float* weight = is_query ? args.q_norm : args.k_norm;
      const int first = is_query ? 0 : args.heads;  // of the heads whose weights lie together
      if (weight && args.norm_whole) {
        const int width = (is_query ? args.heads : args.kv_heads) * dim;
        normalise(x, inverse_rms(all + first * dim, width, args.eps), weight + (head - first) * dim, dim);
      } else if (weight && args.norm_apart) {
        layer_norm(x, weight + (head - first) * dim, dim, args.eps);
      } else if (weight && !args.norm_last) {
        normalise(x, inverse_rms(x, dim, args.eps), weight, dim);
      }
      if (args.rope_dim) rotate(x, args.rope + int64_t(row) * args.rope_dim, args.rope_dim, args.interleaved);
      if (weight && args.norm_last) normalise(x, inverse_rms(x, dim, args.eps), weight, dim);
    } else if (args.norm_values) {
      multiply(x, inverse_rms(x, dim, args.eps), dim);
    }
    // A key of NaN says for the value too that it is damaged. Rows that do not see the token replace its score, but
    // multiply its value, by zero: so that must be a number.
    if (is_key && !(is_sound(x, dim) && is_sound_value(args, values + (head - args.heads) * value_dim)))
      x[0] = __builtin_nanf("");
    if (!is_query && !is_key && !is_sound(x, dim)) __builtin_memset(x, 0, dim * sizeof(float));
    if (is_query) {
      if (args.growth != 0) multiply(x, growth_at(args, position), dim);
      auto* q = args.q + (int64_t(row) * args.heads + head) * args.kv.key_dim;
      to_bf16(q, x, dim);
      __builtin_memset(q + dim, 0, (args.kv.key_dim - dim) * sizeof(*q));  // layers with other heads have written there
    } else if (is_key)
      store_key<Kv>(args.kv, sequence, head - args.heads, position, x, dim);
    else
      store_value<Kv>(args.kv, sequence, head - args.heads - args.kv_heads, position, x, dim);
  });
}

static void qkv(const QkvArgs& args, const Step& step, const Work& work) {
  with_kv_format(args.kv.format, [&](auto kv) { qkv_rows<decltype(kv)>(args, step, work); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
