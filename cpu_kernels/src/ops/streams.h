// A residual stream that is several: the sum of them that a half of a layer reads, and what it makes, spread over them.
#pragma once

#include "ops/norm.h"
#include "ops/router.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kExpandBlocks = 16;  // blocks of a row that a thread takes at a time

// Makes every column (step 1) or row (step `count`) of a matrix [count, count] sum to 1; across: to the next element.
static HYBRID_INLINE void sum_to_one(float* x, int count, int step, int across, float floor) {
  for (int i = 0; i < count; ++i) {
    float total = 0.0f;
    for (int j = 0; j < count; ++j) total += x[i * step + j * across];
    const float factor = 1.0f / (total + floor);
    for (int j = 0; j < count; ++j) x[i * step + j * across] *= factor;
  }
}

// Logits [count, count] to what mixes streams, in place.
static HYBRID_INLINE void balance(float* x, int count, int rounds, float floor) {
  for (int i = 0; i < count; ++i) {
    softmax_all(x + i * count, count);
    for (int j = 0; j < count; ++j) x[i * count + j] += floor;
  }
  sum_to_one(x, count, 1, count, floor);
  for (int round = 1; round < rounds; ++round) {
    sum_to_one(x, count, count, 1, floor);
    sum_to_one(x, count, 1, count, floor);
  }
}

// The weights of a row: those of the sum that is read into `pre`, the others where they are kept.
static HYBRID_INLINE void weigh_streams(const CollapseArgs& args, int row, const float* streams, float* pre) {
  const int count = args.count, mixed = args.rounds ? count * count : 0, spread = args.weights ? count + mixed : 0;
  if (!args.products) {
    for (int i = 0; i < count; ++i) pre[i] = 1.0f / float(count);
    return;
  }
  const float* products = args.products + int64_t(row) * (count + spread);
  const float scale = inverse_rms(streams, count * args.width, args.eps);
  const auto logit = [&](int i, int of) { return products[i] * scale * args.scale[of] + args.base[i]; };
  for (int i = 0; i < count; ++i) pre[i] = sigmoid(logit(i, 0)) + args.floor;
  if (!args.weights) return;
  float* post = args.weights + int64_t(row) * spread;
  const float magnitude = args.magnitude != 0 ? args.magnitude : 2.0f, floor = mixed ? 0.0f : args.floor;
  for (int i = 0; i < count; ++i) post[i] = magnitude * sigmoid(logit(count + i, 1)) + floor;
  for (int i = 0; i < mixed; ++i) post[count + i] = logit(2 * count + i, 2);
  if (mixed) balance(post + count, count, args.rounds, args.floor);
}

static void collapse(const CollapseArgs& args, const Step& step, const Work& work) {
  const int count = args.count, width = args.width;
  for_each(step.rows, 1, work, [&](int row) {
    const float* streams = args.streams + int64_t(row) * args.stream_stride;
    const float* gates = args.gates ? args.gates + int64_t(row) * args.gate_stride : nullptr;
    float pre[kMaxStreams], scales[kMaxStreams];
    weigh_streams(args, row, streams, pre);
    for (int k = 0; gates && k < count; ++k) scales[k] = inverse_rms(streams + int64_t(k) * width, width, args.eps);
    // Up to 16 elements of a stream, from `i` of all streams on.
    const auto read = [&](int k, int64_t i, int some) {
      const F32 x = load_some(streams + i, some);
      if (!gates) return x;
      const F32 gate = load_some(gates + i, some);
      const F32 normed = Isa::mul(Isa::mul(x, Isa::set(scales[k])), load_some(args.norm + i, some));
      return unless_damaged(times_sigmoid(normed, gate), gate);
    };
    const int64_t at = int64_t(row) * args.output_stride;
    for (int i = 0; i < width; i += kBlock) {
      const int some = min(kBlock, width - i);
      F32 sum = Isa::zero();
      for (int k = 0; k < count; ++k) sum = Isa::fma(Isa::set(pre[k]), read(k, int64_t(k) * width + i, some), sum);
      store_some(args.output + at + i, sum, some);
      if (args.cleared) store_some(args.cleared + at + i, Isa::zero(), some);
    }
  });
}

static void stream_gates(const StreamGatesArgs& args, const Step& step, const Work& work) {
  const float share = 1.0f / float(args.count);
  for_each(step.rows, 1, work, [&](int row) {
    const float* low = args.low + int64_t(row) * args.low_stride;
    for (int i = 0; i < args.rank; i += kBlock) {
      const int some = min(kBlock, args.rank - i);
      const F32 x = Isa::mul(load_some(low + i, some), Isa::set(share));
      store_some_bf16(args.output + int64_t(row) * args.output_stride + i, silu(x), some);
    }
    if (!args.weights) return;
    float* weights = args.weights + int64_t(row) * args.count;
    for (int i = 0; i < args.count; ++i) weights[i] = 2.0f * sigmoid(low[args.rank + i] * share);
  });
}

// Up to 16 columns of one row.
static HYBRID_INLINE void expand_columns(const ExpandArgs& args, int row, int column, int some) {
  const int count = args.count, mixed = args.unmixed ? 0 : count;
  float* streams = args.streams + int64_t(row) * args.stream_stride + column;
  const F32 made = load_some(args.input + int64_t(row) * args.input_stride + column, some);
  F32 old[kMaxStreams];
  for (int k = 0; args.weights && k < count; ++k) old[k] = load_some(streams + int64_t(k) * args.width, some);
  const float* post = args.weights ? args.weights + int64_t(row) * (1 + mixed) * count : nullptr;
  for (int k = 0; k < count; ++k) {
    F32 sum = post ? Isa::mul(Isa::set(post[k]), made) : made;
    if (post && !mixed) sum = Isa::add(sum, old[k]);
    for (int j = 0; post && j < mixed; ++j) sum = Isa::fma(Isa::set(post[(1 + j) * count + k]), old[j], sum);
    store_some(streams + int64_t(k) * args.width, sum, some);
  }
}

static void expand(const ExpandArgs& args, const Step& step, const Work& work) {
  const int blocks = (args.width + kBlock - 1) / kBlock;
  for_each(step.rows * blocks, kExpandBlocks, work, [&](int i) {
    const int column = i % blocks * kBlock;
    expand_columns(args, i / blocks, column, min(kBlock, args.width - column));
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
