// Short causal convolutions, whose state is what the last tokens of a sequence brought: between two gates, or with silu
// behind.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

// Up to 16 channels of all rows, in order: those of a sequence follow each other. read(row) is what a token brings,
// write(row, sum) takes what comes out. dilation: from a tap to the next, in tokens.
template <class Args, class Read, class Write>
static HYBRID_INLINE void convolve(const Args& args, const float* biases, const Step& step, int channel, int count,
                                   Read read, Write write, int dilation = 1) {
  const int taps = args.taps, width = args.width, all = kept_tokens(taps, dilation);
  F32 weights[kMaxTaps];
  for (int tap = 0; tap < taps; ++tap) {
    float lanes[kBlock] = {};
    for (int i = 0; i < count; ++i) lanes[i] = args.weight[int64_t(channel + i) * taps + tap];
    weights[tap] = Isa::load(lanes);
  }
  const F32 bias = biases ? load_some(biases + channel, count) : Isa::zero();
  for (int row = 0; row < step.rows; ++row) {
    char* const base = args.state.base + step.sequences[row] * args.state.sequence_stride;
    float* const state = reinterpret_cast<float*>(base) + channel;
    const F32 newest = read(row);
    F32 sum = Isa::fma(weights[taps - 1], newest, bias);
    int place = step.positions[row] % all;
    store_some(state + int64_t(place) * width, newest, count);
    for (int tap = taps - 2; tap >= 0; --tap) {
      place -= dilation;
      if (place < 0) place += all;
      sum = Isa::fma(weights[tap], load_some(state + int64_t(place) * width, count), sum);
    }
    write(row, sum);
  }
}

static void short_conv(const ShortConvArgs& args, const Step& step, const Work& work) {
  const int width = args.width;
  for_each((width + kBlock - 1) / kBlock, 1, work, [&](int block) {
    const int channel = block * kBlock, count = min(kBlock, width - channel);
    const float* in = args.input + channel;
    const auto read = [&](int row) {
      const float* gate = in + int64_t(row) * args.input_stride;
      return Isa::mul(load_some(gate, count), load_some(gate + 2 * width, count));
    };
    const auto write = [&](int row, F32 sum) {
      const F32 gate = load_some(in + int64_t(row) * args.input_stride + width, count);
      store_some_bf16(args.output + int64_t(row) * args.output_stride + channel, Isa::mul(gate, sum), count);
    };
    convolve(args, args.bias, step, channel, count, read, write);
  });
}

static void silu_conv(const SiluConvArgs& args, const Step& step, const Work& work) {
  for_each((args.width + kBlock - 1) / kBlock, 1, work, [&](int block) {
    const int channel = block * kBlock, count = min(kBlock, args.width - channel);
    const auto at = [&](int row) { return args.values + int64_t(row) * args.stride + channel; };
    convolve(
        args, args.bias, step, channel, count, [&](int row) { return load_some(at(row), count); },
        [&](int row, F32 sum) { store_some(at(row), silu(sum), count); });
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
