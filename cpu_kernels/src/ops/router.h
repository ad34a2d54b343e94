// Which experts a token goes to. In fp32 throughout: a router rounded to bf16 sends near-ties to the wrong expert.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kRouterRows = 4;     // rows that share one read of an expert's weights
constexpr int kRouterExperts = 8;  // that a thread takes at once

// out[r * experts] = row r of x times w, for `rows` rows. Each row has two chains of sums, whatever `rows` is.
template <int rows>
static HYBRID_INLINE void score(const RouterArgs& args, const float* x, const float* w, float bias, float* out) {
  F32 even[rows], odd[rows];
  for (int r = 0; r < rows; ++r) even[r] = odd[r] = Isa::zero();
  int i = 0;
  for (; i + 2 * kBlock <= args.hidden; i += 2 * kBlock) {
    const F32 w0 = Isa::load(w + i), w1 = Isa::load(w + i + kBlock);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      even[r] = Isa::fma(Isa::load(x + r * args.input_stride + i), w0, even[r]);
      odd[r] = Isa::fma(Isa::load(x + r * args.input_stride + i + kBlock), w1, odd[r]);
    }
  }
  for (; i < args.hidden; i += kBlock) {
    const int count = min(kBlock, args.hidden - i);
    for (int r = 0; r < rows; ++r)
      even[r] = Isa::fma(load_some(x + r * args.input_stride + i, count), load_some(w + i, count), even[r]);
  }
  for (int r = 0; r < rows; ++r) out[r * args.experts] = Isa::sum(Isa::add(even[r], odd[r])) + bias;
}

// Experts pass over a group of rows: these stay in L1 and the weights stream from L2. The other way round was slower.
static void router(const RouterArgs& args, const Step& step, const Work& work) {
  const int groups = (step.rows + kRouterRows - 1) / kRouterRows;
  for_each(groups * args.experts, kRouterExperts, work, [&](int task) {
    const int expert = task % args.experts, last = min(step.rows, (task / args.experts + 1) * kRouterRows);
    const float* w = args.weight + int64_t(expert) * args.hidden;
    const float bias = args.bias ? args.bias[expert] : 0.0f;
    for (int row = task / args.experts * kRouterRows; row < last;) {
      const float* x = args.input + int64_t(row) * args.input_stride;
      float* out = args.logits + int64_t(row) * args.experts + expert;
      const bool full = row + kRouterRows <= last;
      full ? score<kRouterRows>(args, x, w, bias, out) : score<1>(args, x, w, bias, out);
      row += full ? kRouterRows : 1;
    }
  });
}

// The index of the largest value, the lowest on ties.
static HYBRID_INLINE int index_of_max(const float* x, int count) {
  int best = 0;
  for (int i = 1; i < count; ++i)
    if (x[i] > x[best]) best = i;
  return best;
}

// Logits to probabilities in place.
static HYBRID_INLINE void softmax_all(float* x, int count) {
  const float top = x[index_of_max(x, count)];
  F32 total = Isa::zero();
  for (int i = 0; i < count; i += kBlock) {
    const int some = min(kBlock, count - i);
    const F32 e = exponential(Isa::sub(load_some(x + i, some), Isa::set(top)));
    total = Isa::add(total, Isa::keep(e, 0, some, 0.0f));
    store_some(x + i, e, some);
  }
  const float scale = 1.0f / Isa::sum(total);
  for (int i = 0; i < count; ++i) x[i] *= scale;
}

static HYBRID_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(x < -88.0f ? 88.0f : -x)) + 0.0f * x; }

// Roots of ln(1 + e^x).
static HYBRID_INLINE void root_softplus_all(float* x, int count) {
  for (int i = 0; i < count; i += kBlock) {
    const int some = min(kBlock, count - i);
    store_some(x + i, softplus(load_some(x + i, some)), some);
  }
  for (int i = 0; i < count; ++i) x[i] = __builtin_sqrtf(x[i]);
}

static HYBRID_INLINE bool is_finite(const float* x, int count) {
  return __builtin_isfinite(largest_magnitude(x, count));
}

// The experts of a token, or false if one is none that there is.
static HYBRID_INLINE bool experts_of(const TopkArgs& args, int token, int32_t* ids) {
  const float* known = args.by_token + int64_t(token) * args.top_k;
  for (int i = 0; i < args.top_k; ++i) {
    if (!(known[i] >= 0.0f && known[i] < float(args.experts))) return false;
    ids[i] = int32_t(known[i]);
  }
  return true;
}

// What a row gets whose scores are NaN or infinite, of which none is the largest: some experts, so that ids stay in
// range and differ, and weights by which its logits become NaN.
static HYBRID_INLINE void choose_nothing(int32_t* ids, float* weights, int top_k) {
  for (int i = 0; i < top_k; ++i) {
    ids[i] = i;
    weights[i] = __builtin_nanf("");
  }
}

// The expert with the largest score plus correction, the lowest on ties. What must not be chosen has score -inf.
static HYBRID_INLINE int best_expert(const float* scores, const float* correction, int count) {
  if (!correction) return index_of_max(scores, count);
  int best = 0;
  for (int i = 1; i < count; ++i)
    if (scores[i] + correction[i] > scores[best] + correction[best]) best = i;
  return best;
}

// What a group of experts is worth: its largest score plus correction, or the sum of its two largest.
static HYBRID_INLINE float worth(const float* scores, const float* correction, int count, bool two) {
  float first = -__builtin_inff(), second = first;
  for (int i = 0; i < count; ++i) {
    const float key = scores[i] + (correction ? correction[i] : 0.0f);
    second = key > first ? first : key > second ? key : second;
    first = key > first ? key : first;
  }
  return two ? first + second : first;
}

// Scores outside the best groups become -inf. Groups of probabilities are worth their best one, groups of sigmoids
// their best two.
static HYBRID_INLINE void keep_best_groups(const TopkArgs& args, float* scores) {
  const int size = args.experts / args.groups;
  float worths[kMaxGroups];
  for (int group = 0; group < args.groups; ++group)
    worths[group] = worth(scores + group * size, args.correction ? args.correction + group * size : nullptr, size,
                          args.scoring == Scoring::sigmoid);
  for (int i = 0; i < args.top_groups; ++i) worths[index_of_max(worths, args.groups)] = -__builtin_inff();
  for (int group = 0; group < args.groups; ++group) {
    if (worths[group] == -__builtin_inff()) continue;  // chosen
    for (int i = 0; i < size; ++i) scores[group * size + i] = -__builtin_inff();
  }
}

// The share of the largest of those `left` among those of them that are close to it; of what was chosen before, left is
// -inf. Which are close depends on the logits alone.
static HYBRID_INLINE float sparse_share(const float* left, int best, int count, float margin) {
  const float top = left[best];
  F32 total = Isa::zero();
  for (int i = 0; i < count; i += kBlock) {
    const int some = min(kBlock, count - i);
    alignas(64) float close[kBlock];
    for (int j = 0; j < some; ++j) {
      const float x = left[i + j], size = __builtin_fabsf(x);
      close[j] = (top - x) / (size > top ? size : top) > margin ? -__builtin_inff() : x;
    }
    const F32 e = exponential(Isa::sub(load_some(close, some), Isa::set(top)));
    total = Isa::add(total, Isa::keep(e, 0, some, 0.0f));
  }
  return 1.0f / Isa::sum(total);
}

static HYBRID_INLINE void cap_all(float* x, int count, float cap) {
  for (int i = 0; i < count; i += kBlock) {
    const int some = min(kBlock, count - i);
    store_some(x + i, capped(load_some(x + i, some), cap), some);
  }
}

// Scores, then top-k, or top-k then a softmax over those; the logits are the op's to overwrite.
static void topk(const TopkArgs& args, const Step& step, const Work& work) {
  const int stride = args.experts + (args.shared_weights ? 1 : 0);
  const bool after = args.scoring == Scoring::topk_softmax, sigmoids = args.scoring == Scoring::sigmoid;
  const bool sparse = args.scoring == Scoring::sparsemixer, roots = args.scoring == Scoring::root_softplus;
  for_each(step.rows, 1, work, [&](int row) {
    float* scores = const_cast<float*>(args.logits) + int64_t(row) * stride;
    if (args.shared_weights) args.shared_weights[row] = sigmoid(scores[args.experts]);
    int32_t* ids = args.ids + int64_t(row) * args.top_k;
    float* weights = args.weights + int64_t(row) * args.top_k;
    if (!(is_finite(scores, args.experts) && (!args.correction || is_finite(args.correction, args.experts)))) {
      choose_nothing(ids, weights, args.top_k);
      return;
    }
    if (args.logit_cap > 0) cap_all(scores, args.experts, args.logit_cap);
    if (args.scoring == Scoring::softmax) softmax_all(scores, args.experts);
    for (int i = 0; sigmoids && i < args.experts; ++i) scores[i] = sigmoid(scores[i]);
    if (roots) root_softplus_all(scores, args.experts);
    if (args.groups) keep_best_groups(args, scores);
    if (args.by_token && !experts_of(args, step.tokens[row], ids)) return choose_nothing(ids, weights, args.top_k);
    float total = sigmoids || roots ? 1e-20f : 0.0f;  // all of them may have vanished
    for (int i = 0; i < args.top_k; ++i) {
      if (!args.by_token) ids[i] = best_expert(scores, args.correction, args.experts);
      total += weights[i] = sparse ? sparse_share(scores, ids[i], args.experts, 2.0f * args.jitter) : scores[ids[i]];
      if (!args.by_token) scores[ids[i]] = -__builtin_inff();
    }
    if (after) softmax_all(weights, args.top_k);
    const float scale = args.renormalise && !after && !sparse ? args.scale / total : args.scale;
    for (int i = 0; i < args.top_k; ++i) weights[i] *= args.expert_scales ? scale * args.expert_scales[ids[i]] : scale;
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
