// Heads of which some dimensions turn, and what is turned back behind attention.
#pragma once

#include "ops/entries.h"

namespace hybrid {
namespace HYBRID_ISA {

// A row sees no tokens but those that `see` names, so a key that is no number may say so by itself.
template <class Kv>
static HYBRID_KERNEL void turn_rows(const TurnArgs& args, const Step& step, const Work& work) {
  const int tasks = args.heads + (args.keys ? 1 : 0), dim = args.head_dim;
  alignas(64) float x[kMaxHeadDim];
  for_each(step.rows * tasks, kHeadsAtOnce, work, [&](int task) {
    const int row = task / tasks, head = task % tasks;
    const bool is_key = head == args.heads;
    const float* from = is_key ? args.keys + int64_t(row) * args.key_stride
                               : args.queries + int64_t(row) * args.query_stride + int64_t(head) * dim;
    __builtin_memcpy(x, from, size_t(dim) * sizeof(float));
    if (const float* norm = is_key ? args.norm : args.query_norm)
      normalise(x, inverse_rms(x, dim, args.eps), norm, dim);
    if (!is_key && args.normed) multiply(x, inverse_rms(x, dim, args.eps), dim);
    rotate(x + (args.turns_first ? 0 : dim - args.rope_dim), args.rope + int64_t(row) * args.rope_dim, args.rope_dim,
           args.interleaved);
    mark_unsound(x, dim);
    const int padded = is_key ? args.kv.key_dim : args.padded_dim;
    __builtin_memset(x + dim, 0, size_t(padded - dim) * sizeof(float));
    if (is_key) return store_entry<Kv>(args.made + row * args.kv.entry_bytes, x, padded);
    to_bf16(args.q + (int64_t(row) * args.heads + head) * padded, x, padded);
  });
}

static void turn(const TurnArgs& args, const Step& step, const Work& work) {
  with_kv_format(args.kv.format, [&](auto kv) { turn_rows<decltype(kv)>(args, step, work); });
}

static void unturn(const UnturnArgs& args, const Step& step, const Work& work) {
  const int dim = args.rope_dim, half = dim / 2;
  alignas(64) float x[kMaxHeadDim], back[kMaxHeadDim];
  for_each(step.rows * args.heads, kHeadsAtOnce, work, [&](int task) {
    const int row = task / args.heads, head = task % args.heads;
    const float* table = args.rope + int64_t(row) * dim;
    for (int i = 0; i < half; ++i) {
      back[i] = table[i];
      back[half + i] = -table[half + i];
    }
    bf16* values = args.values + int64_t(row) * args.stride + (head + 1) * args.head_dim - dim;
    for (int i = 0; i < dim; ++i) {
      const uint32_t bits = uint32_t(values[i]) << 16;
      __builtin_memcpy(x + i, &bits, sizeof bits);
    }
    rotate(x, back, dim, args.interleaved);
    to_bf16(values, x, dim);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
