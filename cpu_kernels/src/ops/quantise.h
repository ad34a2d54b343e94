// int8 activation rows: int8 values, the sum of each 32 of them, a scale for each 256. Symmetric, rounded to nearest.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr float kMinQuantised = 1e-36f;  // below, 127 / x would overflow

// value_at(i) gives inputs [i, i + 16) in fp32, zeros beyond the end of the row; inputs: padded.
template <class ValueAt>
static HYBRID_INLINE void quantise_row(ValueAt value_at, int inputs, char* out) {
  int32_t* sums = reinterpret_cast<int32_t*>(out + inputs);
  float* scales = reinterpret_cast<float*>(sums + inputs / kSumInputs);
  for (int group = 0; group < inputs; group += kScaleInputs) {
    const int end = min(inputs, group + kScaleInputs);
    F32 top = Isa::zero();
    for (int i = group; i < end; i += kBlock) top = Isa::max_magnitude(top, value_at(i));
    const float maximum = Isa::max_magnitude_lane(top);
    const F32 factor = Isa::set(maximum > kMinQuantised ? 127.0f / maximum : 0.0f);
    scales[group / kScaleInputs] = maximum / 127.0f;
    if (!__builtin_isfinite(maximum)) {  // no int8 says so, but zeros times such a scale are NaN
      __builtin_memset(out + group, 0, size_t(end - group));
      __builtin_memset(sums + group / kSumInputs, 0, size_t(end - group) / kSumInputs * sizeof *sums);
      continue;
    }
    for (int i = group; i < end; i += kSumInputs) {
      const F32 low = Isa::round(Isa::mul(value_at(i), factor));
      const F32 high = Isa::round(Isa::mul(value_at(i + kBlock), factor));
      Isa::store_int8(out + i, low);
      Isa::store_int8(out + i + kBlock, high);
      sums[i / kSumInputs] = int32_t(Isa::sum(Isa::add(low, high)));
    }
  }
}

static void quantise(const QuantiseArgs& args, const Step& step, const Work& work) {
  for_each(step.rows * args.multiple, 1, work, [&](int row) {
    const char* in = reinterpret_cast<const char*>(args.input) + row * args.input_stride;
    const auto value_at = [&](int i) { return Isa::from_bf16(in + 2 * i); };
    quantise_row(value_at, args.width, args.output + row * args.output_stride);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
