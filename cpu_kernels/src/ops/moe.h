// Routed experts in two passes over the rows sorted by expert: gate, up and activation; then down, weighted and summed.
// A dense feed-forward is the same with one expert.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

// This thread's part of all active experts' blocks, laid end to end and weighed by what they cost: reading an expert
// costs as much as multiplying a handful of rows. Calls function(expert, rows, first block, last block).
template <class Function>
static void for_expert_blocks(const Routing& routing, int blocks, const Work& work, Function function) {
  constexpr int kReadRows = 12;
  const int active = *routing.count;
  const auto cost = [&](int i) {
    const int expert = routing.active[i];
    return int64_t(most(kReadRows, routing.offsets[expert + 1] - routing.offsets[expert]));
  };
  int64_t total = 0;
  for (int i = 0; i < active; ++i) total += cost(i) * blocks;
  const int64_t begin = total * work.thread / work.threads, end = total * (work.thread + 1) / work.threads;
  int64_t before = 0;
  for (int i = 0; i < active && before < end; ++i) {
    const int64_t each = cost(i), after = before + each * blocks;
    // A block belongs to the thread in whose part it begins.
    const auto cut = [&](int64_t at) {
      return at <= before ? 0 : at >= after ? blocks : int((at - before + each - 1) / each);
    };
    if (cut(begin) < cut(end)) function(routing.active[i], cut(begin), cut(end));
    before = after;
  }
}

static void gate_up(const GateUpArgs& args, const Step&, const Work& work) {
  const Routing& routing = args.routing;
  for_expert_blocks(routing, args.blocks, work, [&](int expert, int first, int last) {
    const int begin = routing.offsets[expert], rows = routing.offsets[expert + 1] - begin;
    const Blocks w{args.experts + expert * args.expert_stride, int64_t(args.pairs) * kLine, kLine, args.pairs};
    product<2>({args.input, args.input_stride, routing.rows + begin}, rows, w, 2 * first, 2 * last,
               reinterpret_cast<float*>(work.scratch), [&](auto& acc, int row, int block) {
                 constexpr int MR = sizeof acc / sizeof acc[0], NB = sizeof acc[0] / sizeof acc[0][0];
                 for (int r = 0; r < MR; ++r) {
                   bf16* out = args.output + int64_t(begin + row + r) * args.output_stride + block / 2 * kBlock;
                   for (int j = 0; j < NB; j += 2)
                     Isa::store_bf16(out + j / 2 * kBlock, Isa::mul(silu(acc[r][j]), acc[r][j + 1]));
                 }
               });
  });
}

// Threads split the output columns and take the experts in ascending order: sums need no lock and have one order.
static void down(const DownArgs& args, const Step&, const Work& work) {
  const Routing& routing = args.routing;
  const Range blocks = share(args.blocks, work);
  for (int i = 0; i < *routing.count; ++i) {
    const int expert = routing.active[i], begin = routing.offsets[expert];
    const Blocks w{args.experts + expert * args.expert_stride, int64_t(args.pairs) * kLine, kLine, args.pairs};
    product<1>({args.input + int64_t(begin) * args.input_stride, args.input_stride, nullptr},
               routing.offsets[expert + 1] - begin, w, blocks.first, blocks.last,
               reinterpret_cast<float*>(work.scratch), [&](auto& acc, int row, int block) {
                 constexpr int MR = sizeof acc / sizeof acc[0], NB = sizeof acc[0] / sizeof acc[0][0];
                 for (int r = 0; r < MR; ++r) {
                   const int sorted = begin + row + r;
                   const F32 weight = Isa::set(routing.weights[sorted]);
                   float* out = args.output + int64_t(routing.rows[sorted]) * args.output_stride + block * kBlock;
                   for (int j = 0; j < NB; ++j, out += kBlock)
                     Isa::store(out, Isa::fma(weight, acc[r][j], Isa::load(out)));
                 }
               });
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
