// Activation rows of int8: symmetric, rounded to nearest. What formats/kinds.h and formats/grouped.h read is written
// here.
#pragma once

#include "executor/grouped.h"
#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr float kMinQuantised = 1e-36f;  // below, 127 / x would overflow

// Inputs [first, last), which share a scale, to out: int8 values, and the sum of each 32 of them. Returns the scale.
// value_at(i) gives inputs [i, i + 16) in fp32, zeros beyond the end of the row.
template <class ValueAt>
static HYBRID_INLINE float quantise_some(ValueAt value_at, int first, int last, char* out, int32_t* sums) {
  F32 top = Isa::zero();
  for (int i = first; i < last; i += kBlock) top = Isa::max_magnitude(top, value_at(i));
  const float maximum = Isa::max_magnitude_lane(top);
  const F32 factor = Isa::set(maximum > kMinQuantised ? 127.0f / maximum : 0.0f);
  if (!__builtin_isfinite(maximum)) {  // no int8 says so, but zeros times such a scale are NaN
    __builtin_memset(out + first, 0, size_t(last - first));
    __builtin_memset(sums, 0, size_t(last - first) / kSumInputs * sizeof *sums);
    return maximum;
  }
  for (int i = first; i < last; i += kSumInputs) {
    const F32 low = Isa::round(Isa::mul(value_at(i), factor));
    const F32 high = Isa::round(Isa::mul(value_at(i + kBlock), factor));
    Isa::store_int8(out + i, low);
    Isa::store_int8(out + i + kBlock, high);
    sums[(i - first) / kSumInputs] = int32_t(Isa::sum(Isa::add(low, high)));
  }
  return maximum / 127.0f;
}

// An int8 row: int8 values, the sum of each 32 of them, a scale for each 256. inputs: padded.
template <class ValueAt>
static HYBRID_INLINE void quantise_row(ValueAt value_at, int inputs, char* out) {
  int32_t* sums = reinterpret_cast<int32_t*>(out + inputs);
  float* scales = reinterpret_cast<float*>(sums + inputs / kSumInputs);
  for (int i = 0; i < inputs; i += kScaleInputs)
    scales[i / kScaleInputs] = quantise_some(value_at, i, min(inputs, i + kScaleInputs), out, sums + i / kSumInputs);
}

// A grouped row: int8 values, and of each 32 a scale and the scaled sum.
template <class ValueAt>
static HYBRID_INLINE void quantise_grouped_row(ValueAt value_at, int inputs, char* out) {
  RowGroup* groups = reinterpret_cast<RowGroup*>(out + inputs);
  for (int i = 0; i < inputs; i += kRowGroup) {
    int32_t sum;
    const float scale = quantise_some(value_at, i, i + kRowGroup, out, &sum);
    groups[i / kRowGroup] = {scale, scale * float(sum)};
  }
}

static void quantise(const QuantiseArgs& args, const Step& step, const Work& work) {
  for_each(step.rows * args.multiple, 1, work, [&](int row) {
    const char* in = reinterpret_cast<const char*>(args.input) + row * args.input_stride;
    char* const out = args.output + row * args.output_stride;
    const auto value_at = [&](int i) { return Isa::from_bf16(in + 2 * i); };
    args.grouped ? quantise_grouped_row(value_at, args.width, out) : quantise_row(value_at, args.width, out);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
