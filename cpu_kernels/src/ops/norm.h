#pragma once

#include "ops/quantise.h"

namespace hybrid {
namespace HYBRID_ISA {

static HYBRID_INLINE float mean(const float* x, int width) {
  F32 sums = Isa::zero();
  for (int i = 0; i < width; i += kBlock) sums = Isa::add(sums, load_some(x + i, min(kBlock, width - i)));
  return Isa::sum(sums) / float(width);
}

static HYBRID_INLINE float sum_of_squares(const float* x, int width, float centre = 0.0f) {
  F32 squares = Isa::zero();
  for (int i = 0; i < width; i += kBlock) {
    const int count = min(kBlock, width - i);
    const F32 v = Isa::keep(Isa::sub(load_some(x + i, count), Isa::set(centre)), 0, count, 0.0f);
    squares = Isa::fma(v, v, squares);
  }
  return Isa::sum(squares);
}

// 1 / sqrt(mean((x - centre)^2) + eps); NaN where the squares overflow, which else would make zeros of the row
static HYBRID_INLINE float inverse_rms(const float* x, int width, float eps, float centre = 0.0f) {
  const float sum = sum_of_squares(x, width, centre);
  return 1.0f / __builtin_sqrtf(sum / float(width) + eps) + 0.0f * sum;
}

static void norm(const NormArgs& args, const Step& step, const Work& work) {
  for_each(args.logit_rows ? step.logit_rows : step.rows, 1, work, [&](int row) {
    const float* x = args.input + int64_t(args.logit_rows ? step.logit_index[row] : row) * args.input_stride;
    const float centre = args.centred ? mean(x, args.width) : 0.0f;
    const F32 scale = Isa::set(inverse_rms(x, args.width, args.eps, centre));
    const auto normed = [&](int i) {
      const int count = max(0, min(kBlock, args.width - i));
      const F32 v = Isa::sub(load_some(x + i, count), Isa::set(centre));
      const F32 y = Isa::mul(Isa::mul(v, scale), load_some(args.weight + i, count));
      return args.bias ? Isa::add(y, load_some(args.bias + i, count)) : y;
    };
    const int64_t at = int64_t(row) * args.output_stride;
    for (int i = 0; i < args.width; i += kBlock) {
      const int count = min(kBlock, args.width - i);
      if (args.output) store_some_bf16(args.output + at + i, normed(i), count);
      if (args.output_f32) {
        const F32 y = normed(i);
        float* out = args.output_f32 + at + i;
        const F32 sum = args.accumulate ? Isa::add(load_some(out, count), y) : y;
        store_some(out, args.factor ? Isa::mul(sum, Isa::set(*args.factor)) : sum, count);
      }
      if (args.cleared) store_some(args.cleared + at + i, Isa::zero(), count);
    }
    const int inputs = (args.width + kInputs - 1) / kInputs * kInputs;
    if (args.output8) quantise_row(normed, inputs, args.output8 + row * args.output8_stride);
    if (args.output_grouped)
      quantise_grouped_row(normed, inputs, args.output_grouped + row * args.output_grouped_stride);
    if (args.output_wide) quantise_wide_row(normed, inputs, args.output_wide + row * args.output_wide_stride);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
