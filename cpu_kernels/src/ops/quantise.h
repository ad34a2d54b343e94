// Activation rows of whole numbers: symmetric, rounded to nearest. What formats/kinds.h, formats/grouped.h and
// ops/fp4_product.h read is written here.
#pragma once

#include "executor/grouped.h"
#include "executor/wide.h"
#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr float kMinQuantised = 1e-36f;  // below, 127 / x would overflow
constexpr float kMinWide = 2e-34f;       // and 1 / (x / kWideTop)

// What whole numbers stand for, and what makes them of values.
struct QuantisedStep {
  float scale, factor;
};

static HYBRID_INLINE QuantisedStep int8_step(float maximum) {
  return {maximum / 127.0f, maximum > kMinQuantised ? 127.0f / maximum : 0.0f};
}

// A power of two, so that values of few bits are exact.
static HYBRID_INLINE QuantisedStep wide_step(float maximum) {
  float scale = maximum / kWideTop;
  uint32_t bits;
  __builtin_memcpy(&bits, &scale, sizeof bits);
  bits = (bits + 0x7fffff) & 0xff800000;  // rounded up
  __builtin_memcpy(&scale, &bits, sizeof bits);
  return {scale, maximum > kMinWide ? 1.0f / scale : 0.0f};
}

// Inputs [first, last), which share a scale, as whole numbers: 32 at a time, from input i on, they go to
// store(i, the first 16, the others). Returns the scale. value_at(i) gives inputs [i, i + 16) in fp32, zeros beyond the
// end of the row; step_of(maximum) the step.
template <class ValueAt, class StepOf, class Store>
static HYBRID_INLINE float quantise_some(ValueAt value_at, int first, int last, StepOf step_of, Store store) {
  F32 top = Isa::zero();
  for (int i = first; i < last; i += kBlock) top = Isa::max_magnitude(top, value_at(i));
  const float maximum = Isa::max_magnitude_lane(top);
  if (!__builtin_isfinite(maximum)) {  // no whole number says so, but zeros times such a scale are NaN
    for (int i = first; i < last; i += kSumInputs) store(i, Isa::zero(), Isa::zero());
    return maximum;
  }
  const QuantisedStep step = step_of(maximum);
  const F32 factor = Isa::set(step.factor);
  for (int i = first; i < last; i += kSumInputs)
    store(i, Isa::round(Isa::mul(value_at(i), factor)), Isa::round(Isa::mul(value_at(i + kBlock), factor)));
  return step.scale;
}

// The same as int8 values to out, and the sum of each 32 of them to sums.
template <class ValueAt>
static HYBRID_INLINE float quantise_int8(ValueAt value_at, int first, int last, char* out, int32_t* sums) {
  return quantise_some(value_at, first, last, int8_step, [&](int i, F32 low, F32 high) {
    Isa::store_int8(out + i, low);
    Isa::store_int8(out + i + kBlock, high);
    sums[(i - first) / kSumInputs] = int32_t(Isa::sum(Isa::add(low, high)));
  });
}

// An int8 row: int8 values, the sum of each 32 of them, a scale for each 256. inputs: padded.
template <class ValueAt>
static HYBRID_INLINE void quantise_row(ValueAt value_at, int inputs, char* out) {
  int32_t* sums = reinterpret_cast<int32_t*>(out + inputs);
  float* scales = reinterpret_cast<float*>(sums + inputs / kSumInputs);
  for (int i = 0; i < inputs; i += kScaleInputs)
    scales[i / kScaleInputs] = quantise_int8(value_at, i, min(inputs, i + kScaleInputs), out, sums + i / kSumInputs);
}

// A grouped row: int8 values, and of each 32 a scale and scaled sums.
template <class ValueAt>
static HYBRID_INLINE void quantise_grouped_row(ValueAt value_at, int inputs, char* out) {
  RowGroup* groups = reinterpret_cast<RowGroup*>(out + inputs);
  for (int i = 0; i < inputs; i += kRowGroup) {
    float first = 0, second = 0;
    const float scale = quantise_some(value_at, i, i + kRowGroup, int8_step, [&](int, F32 low, F32 high) {
      Isa::store_int8(out + i, low);
      Isa::store_int8(out + i + kBlock, high);
      first = Isa::sum(low), second = Isa::sum(high);
    });
    groups[i / kRowGroup] = {scale, scale * (first + second), {scale * first, scale * second}};
  }
}

// 16 whole numbers as their upper and lower bytes.
static HYBRID_INLINE void store_wide(char* high, char* low, F32 x) {
  const F32 upper = Isa::round(Isa::mul(x, Isa::set(1.0f / kWideBase)));
  Isa::store_int8(high, upper);
  Isa::store_int8(low, Isa::fma(upper, Isa::set(-float(kWideBase)), x));
}

// A wide row.
template <class ValueAt>
static HYBRID_INLINE void quantise_wide_row(ValueAt value_at, int inputs, char* out) {
  const WideOffsets at(inputs);
  bf16* const values = reinterpret_cast<bf16*>(out);
  char *const high = out + at.high, *const low = out + at.low;
  WideStart* const starts = reinterpret_cast<WideStart*>(out + at.starts);
  float* const scales = reinterpret_cast<float*>(out + at.scales);
  for (int i = 0; i < inputs; i += kBlock) Isa::store_bf16(values + i, value_at(i));
  const auto store = [&](int i, F32 first, F32 second) {
    store_wide(high + i, low + i, first);
    store_wide(high + i + kBlock, low + i + kBlock, second);
    const int32_t sum = int32_t(Isa::sum(first));
    starts[i / kSumInputs] = {-kFp4Offset * sum, -kFp4Offset * (sum + int32_t(Isa::sum(second)))};
  };
  for (int i = 0; i < inputs; i += kScaleInputs)
    scales[i / kScaleInputs] = quantise_some(value_at, i, min(inputs, i + kScaleInputs), wide_step, store);
}

static void quantise(const QuantiseArgs& args, const Step& step, const Work& work) {
  for_each(step.rows * args.multiple, 1, work, [&](int row) {
    const char* in = reinterpret_cast<const char*>(args.input) + row * args.input_stride;
    char* const out = args.output + row * args.output_stride;
    const auto value_at = [&](int i) { return Isa::from_bf16(in + 2 * i); };
    if (args.wide) return quantise_wide_row(value_at, args.width, out);
    args.grouped ? quantise_grouped_row(value_at, args.width, out) : quantise_row(value_at, args.width, out);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
