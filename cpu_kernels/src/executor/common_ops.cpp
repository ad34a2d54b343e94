#include "executor/common_ops.h"

#include <algorithm>
#include <cmath>

namespace hybrid {
namespace {

int take(const Work& work) { return int(__atomic_fetch_add(work.taken, 1, __ATOMIC_RELAXED)); }

}  // namespace

// The angle is rounded to fp32, as the reference implementations do: at position 100000 that moves it by more than any
// kernel's own error.
void rope_table(const RopeTableArgs& args, const Step& step, const Work& work) {
  const int half = args.dim / 2;
  for (int row; (row = take(work)) < step.rows;) {
    float* out = args.table + int64_t(row) * args.dim;
    const bool is_long = args.long_frequencies && args.lengths[row] > args.long_above;
    const float* frequencies = is_long ? args.long_frequencies : args.inverse_frequencies;
    const float factor = is_long ? args.long_factor : args.factor;
    const int position = step.positions[row] / args.every * args.every;
    for (int i = 0; i < half; ++i) {
      const float angle = float(position) * frequencies[i];
      out[i] = float(std::cos(double(angle))) * factor;
      out[half + i] = float(std::sin(double(angle))) * factor;
    }
  }
}

// A counting sort. Serial: a few microseconds beside the milliseconds of the experts.
void group(const GroupArgs& args, const Step& step, const Work& work) {
  if (take(work) > 0) return;
  const Routing& r = args.routing;
  const int pairs = step.rows * args.top_k;
  const float plain = args.weight != 0 ? args.weight : 1.0f;
  const auto given = [&](int pair) { return args.ids ? args.ids[pair] : 0; };
  // Python may have written the ids. One that no expert has goes to the first, by a weight that shows in the logits.
  const auto expert = [&](int pair) { return given(pair) < args.experts ? given(pair) : 0; };
  std::fill(r.offsets, r.offsets + args.experts + 1, 0);
  for (int pair = 0; pair < pairs; ++pair)
    if (expert(pair) >= 0) ++r.offsets[expert(pair) + 1];
  *r.count = 0;
  for (int e = 0; e < args.experts; ++e) {
    if (r.offsets[e + 1] > 0) r.active[(*r.count)++] = e;
    r.offsets[e + 1] += r.offsets[e];
  }
  for (int pair = 0; pair < pairs; ++pair) {
    if (expert(pair) < 0) continue;
    const int at = r.offsets[expert(pair)]++;
    r.rows[at] = pair / args.top_k;
    r.weights[at] = given(pair) >= args.experts ? NAN : args.weights ? args.weights[pair] : plain;
    if (args.pairs) args.pairs[at] = pair;
  }
  for (int e = args.experts; e > 0; --e) r.offsets[e] = r.offsets[e - 1];
  r.offsets[0] = 0;
}

}  // namespace hybrid
