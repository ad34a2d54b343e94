// What a table says of a token and those before it, added to the streams of a residual.
#pragma once

#include "ops/norm.h"
#include "ops/router.h"
#include "ops/short_conv.h"

namespace hybrid {
namespace HYBRID_ISA {

// Rows of a sequence need what those before them leave in its state, and there is little to do: one thread does all.
static void ngrams(const NgramArgs& args, const Step& step, const Work& work) {
  const int kept = kept_tokens(args.size), parts = (args.size - 1) * args.heads;
  const int64_t *const rows_of = args.hash + args.size, *const first_of = rows_of + parts;
  for_each(1, 1, work, [&](int) {
    for (int row = 0; row < step.rows; ++row) {
      auto* const tokens =
          reinterpret_cast<int32_t*>(args.state.base + step.sequences[row] * args.state.sequence_stride);
      const int position = step.positions[row];
      int32_t* ids = args.ids + int64_t(row) * parts;
      tokens[position % kept] = step.tokens[row];
      uint64_t mixed = uint64_t(step.tokens[row]) * uint64_t(args.hash[0]);
      bool within = true;  // the text of the newest token
      for (int back = 1, part = 0; back < args.size; ++back) {
        within = within && position >= back && tokens[(position - back) % kept] != args.end;
        const int token = within ? tokens[(position - back) % kept] : args.end;
        mixed ^= uint64_t(token) * uint64_t(args.hash[back]);
        for (int head = 0; head < args.heads; ++head, ++part)
          ids[part] = int32_t(first_of[part] + (rows_of[part] > 0 ? int64_t(mixed % uint64_t(rows_of[part])) : 0));
      }
    }
  });
}

static void lookup(const LookupArgs& args, const Step& step, const Work& work) {
  for_each(step.rows * args.count, 1, work, [&](int task) {
    const int row = task / args.count, i = task % args.count;
    __builtin_memcpy(args.output + int64_t(row) * args.output_stride + int64_t(i) * args.dim,
                     args.table + int64_t(args.ids[task]) * args.dim, size_t(args.dim) * sizeof(bf16));
  });
}

// The sum of a * b * their weights.
static HYBRID_INLINE float weighted_dot(const float* a, const float* of_a, const float* b, const float* of_b,
                                        int width) {
  F32 sum = Isa::zero();
  for (int i = 0; i < width; i += kBlock) {
    const int count = min(kBlock, width - i);
    const F32 left = Isa::mul(load_some(a + i, count), load_some(of_a + i, count));
    sum = Isa::fma(left, Isa::mul(load_some(b + i, count), load_some(of_b + i, count)), sum);
  }
  return Isa::sum(sum);
}

static void ngram_gate(const NgramGateArgs& args, const Step& step, const Work& work) {
  constexpr float least = 1e-6f;  // of what a root is taken of
  for_each(step.rows, 1, work, [&](int row) {
    const int width = args.width;
    const float* keys = args.projected + int64_t(row) * args.projected_stride;
    const float square = sum_of_squares(keys + int64_t(args.count) * width, width) / float(width);
    float* gates = args.gates + int64_t(row) * 2 * args.count;
    for (int k = 0; k < args.count; ++k) {
      const int64_t at = int64_t(k) * width;
      const float *key = keys + at, *stream = args.streams + int64_t(row) * args.stream_stride + at;
      const float scales = inverse_rms(key, width, args.eps) * inverse_rms(stream, width, args.eps);
      const float dot = weighted_dot(key, args.key_norm + at, stream, args.query_norm + at, width);
      const float x = dot * scales / __builtin_sqrtf(float(width)), size = __builtin_fabsf(x);
      const float root = __builtin_sqrtf(size < least ? least : size);
      gates[k] = sigmoid(x > 0 ? root : x < 0 ? -root : x);
      gates[args.count + k] = gates[k] / __builtin_sqrtf(gates[k] * gates[k] * square + args.eps) + 0.0f * square;
    }
  });
}

static void ngram_conv(const NgramConvArgs& args, const Step& step, const Work& work) {
  const int width = args.width / args.count, blocks = (width + kBlock - 1) / kBlock;
  for_each(args.count * blocks, 1, work, [&](int task) {
    const int stream = task / blocks, column = task % blocks * kBlock, count = min(kBlock, width - column);
    const int channel = stream * width + column;
    const F32 weight = load_some(args.norm + channel, count);
    const auto value = [&](int row) {
      return load_some(args.values + int64_t(row) * args.value_stride + column, count);
    };
    const auto gates = [&](int row) { return args.gates + int64_t(row) * 2 * args.count + stream; };
    const auto read = [&](int row) { return Isa::mul(Isa::mul(value(row), Isa::set(gates(row)[args.count])), weight); };
    const auto write = [&](int row, F32 sum) {
      float* const out = args.streams + int64_t(row) * args.stream_stride + channel;
      const F32 taken = Isa::fma(value(row), Isa::set(gates(row)[0]), silu(sum));
      store_some(out, Isa::add(load_some(out, count), taken), count);
    };
    convolve(args, nullptr, step, channel, count, read, write, args.dilation);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
