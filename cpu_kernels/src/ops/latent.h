// Latent attention between its projections and its matrices of heads: what a token leaves in the arena is one row that
// is key and value of all heads.
#pragma once

#include "ops/qkv.h"

namespace hybrid {
namespace HYBRID_ISA {

// A row that is no number says so by a key of NaN. Its first `rank` dimensions are values too, which rows that do not
// see the token multiply by zero: so these become zeros.
static HYBRID_INLINE void make_sound(float* x, int rank, int dim) {
  if (is_sound(x, dim)) return;
  __builtin_memset(x, 0, size_t(dim) * sizeof(float));
  x[rank] = __builtin_nanf("");
}

template <class Kv>
static HYBRID_KERNEL void latent_rows(const LatentArgs& args, const Step& step, const Work& work) {
  const int dim = args.rank + args.rope_dim, query_dim = args.nope_dim + args.rope_dim, tasks = args.heads + 1;
  const int stored = args.rank + room_behind(args.rope_dim);
  alignas(64) float x[kMaxHeadDim];
  for_each(step.rows * tasks, kHeadsAtOnce, work, [&](int task) {
    const int row = task / tasks, head = task % tasks;
    const float* table = args.rope ? args.rope + int64_t(row) * args.rope_dim : nullptr;
    if (head < args.heads) {
      const float* query = args.queries + int64_t(row) * args.query_stride + int64_t(head) * query_dim;
      const int64_t at = int64_t(row) * args.heads + head;
      const float grown = growth_at(args, step.positions[row]);
      for (int i = 0; i < args.nope_dim; i += kMaxHeadDim) {
        const int width = args.nope_dim - i < kMaxHeadDim ? args.nope_dim - i : kMaxHeadDim;
        __builtin_memcpy(x, query + i, size_t(width) * sizeof(float));
        multiply(x, grown, width);
        to_bf16(args.plain + at * args.plain_stride + i, x, width);
      }
      __builtin_memcpy(x, query + args.nope_dim, size_t(args.rope_dim) * sizeof(float));
      if (table) rotate(x, table, args.rope_dim, args.interleaved);
      multiply(x, grown, args.rope_dim);
      bf16* behind = args.q + at * args.kv.key_dim + args.rank;
      to_bf16(behind, x, args.rope_dim);
      __builtin_memset(behind + args.rope_dim, 0, size_t(args.kv.key_dim - dim) * sizeof(*behind));
      return;
    }
    __builtin_memcpy(x, args.latents + int64_t(row) * args.latent_stride, size_t(dim) * sizeof(float));
    if (args.norm) {
      normalise(x, inverse_rms(x, args.rank, args.eps), args.norm, args.rank);
      if (table) rotate(x + args.rank, table, args.rope_dim, args.interleaved);
    }
    for (int i = dim; i < stored; ++i) x[i] = 0.0f;
    make_sound(x, args.rank, stored);
    store_key<Kv>(args.kv, step.sequences[row], 0, step.positions[row], x, stored);
  });
}

static void latent(const LatentArgs& args, const Step& step, const Work& work) {
  with_kv_format(args.kv.format, [&](auto kv) { latent_rows<decltype(kv)>(args, step, work); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
