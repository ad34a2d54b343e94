// Which experts a token goes to. In fp32 throughout: a router rounded to bf16 sends near-ties to the wrong expert.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

static HYBRID_INLINE float dot(const float* a, const float* b, int width) {
  F32 sum0 = Isa::zero(), sum1 = Isa::zero();
  int i = 0;
  for (; i + 2 * kBlock <= width; i += 2 * kBlock) {
    sum0 = Isa::fma(Isa::load(a + i), Isa::load(b + i), sum0);
    sum1 = Isa::fma(Isa::load(a + i + kBlock), Isa::load(b + i + kBlock), sum1);
  }
  for (; i < width; i += kBlock) {
    const int count = least(kBlock, width - i);
    sum0 = Isa::fma(load_some(a + i, count), load_some(b + i, count), sum0);
  }
  return Isa::sum(Isa::add(sum0, sum1));
}

static void router(const RouterArgs& args, const Step& step, const Work& work) {
  constexpr int kRowBlock = 16;  // rows that pass over an expert's weights while these are in L1
  const int row_blocks = (step.rows + kRowBlock - 1) / kRowBlock;
  const Range tasks = share(row_blocks * args.experts, work);
  for (int task = tasks.first; task < tasks.last; ++task) {
    const int expert = task % args.experts, first = task / args.experts * kRowBlock;
    for (int row = first; row < least(first + kRowBlock, step.rows); ++row)
      args.logits[int64_t(row) * args.experts + expert] =
          dot(args.input + int64_t(row) * args.input_stride, args.weight + int64_t(expert) * args.hidden, args.hidden);
  }
}

// The index of the largest value, the lowest on ties.
static HYBRID_INLINE int largest_index(const float* x, int count) {
  int best = 0;
  for (int i = 1; i < count; ++i)
    if (x[i] > x[best]) best = i;
  return best;
}

// Logits to probabilities in place.
static HYBRID_INLINE void softmax_all(float* x, int count) {
  const float top = x[largest_index(x, count)];
  F32 total = Isa::zero();
  for (int i = 0; i < count; i += kBlock) {
    const int some = least(kBlock, count - i);
    const F32 e = exponential(Isa::sub(load_some(x + i, some), Isa::set(top)));
    total = Isa::add(total, Isa::keep(e, 0, some, 0.0f));
    store_some(x + i, e, some);
  }
  const float scale = 1.0f / Isa::sum(total);
  for (int i = 0; i < count; ++i) x[i] *= scale;
}

// Softmax then top-k, or top-k then softmax over those; the scores are the op's to overwrite.
static void topk(const TopkArgs& args, const Step& step, const Work& work) {
  const Range rows = share(step.rows, work);
  for (int row = rows.first; row < rows.last; ++row) {
    float* scores = const_cast<float*>(args.logits) + int64_t(row) * args.experts;
    int32_t* ids = args.ids + int64_t(row) * args.top_k;
    float* weights = args.weights + int64_t(row) * args.top_k;
    if (!args.softmax_after) softmax_all(scores, args.experts);
    float total = 0.0f;
    for (int i = 0; i < args.top_k; ++i) {
      ids[i] = largest_index(scores, args.experts);
      total += weights[i] = scores[ids[i]];
      scores[ids[i]] = -__builtin_inff();
    }
    if (args.softmax_after) softmax_all(weights, args.top_k);
    const float scale = args.renormalise && !args.softmax_after ? args.scale / total : args.scale;
    for (int i = 0; i < args.top_k; ++i) weights[i] *= scale;
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
