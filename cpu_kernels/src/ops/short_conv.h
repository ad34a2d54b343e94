// A short causal convolution between two gates, whose state is what the last tokens of a sequence brought.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

// Up to 16 channels of all rows, in order: those of a sequence follow each other.
static HYBRID_INLINE void convolve(const ShortConvArgs& args, const Step& step, int channel, int count) {
  const int taps = args.taps, width = args.width;
  F32 weights[kMaxTaps];
  for (int tap = 0; tap < taps; ++tap) {
    float lanes[kBlock] = {};
    for (int i = 0; i < count; ++i) lanes[i] = args.weight[int64_t(channel + i) * taps + tap];
    weights[tap] = Isa::load(lanes);
  }
  const F32 bias = args.bias ? load_some(args.bias + channel, count) : Isa::zero();
  for (int row = 0; row < step.rows; ++row) {
    const float* in = args.input + int64_t(row) * args.input_stride + channel;
    char* place = args.state.base + step.sequences[row] * args.state.sequence_stride;
    float* state = reinterpret_cast<float*>(place) + channel;
    F32 newest = Isa::mul(load_some(in, count), load_some(in + 2 * width, count));
    F32 sum = Isa::fma(weights[taps - 1], newest, bias);
    for (int tap = taps - 2; tap >= 0; --tap) {
      float* kept = state + int64_t(tap) * width;
      const F32 older = load_some(kept, count);
      sum = Isa::fma(weights[tap], older, sum);
      store_some(kept, newest, count);
      newest = older;
    }
    const F32 out = Isa::mul(load_some(in + width, count), sum);
    store_some_bf16(args.output + int64_t(row) * args.output_stride + channel, out, count);
  }
}

static void short_conv(const ShortConvArgs& args, const Step& step, const Work& work) {
  for_each((args.width + kBlock - 1) / kBlock, 1, work,
           [&](int block) { convolve(args, step, block * kBlock, min(kBlock, args.width - block * kBlock)); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
