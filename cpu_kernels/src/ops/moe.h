// Routed experts in two passes over the rows sorted by expert: gate, up and activation; then down, weighted and summed.
// A dense feed-forward is the same with one expert.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

// Blocks [first, last) of one expert's gate and up, for the rows that go to it.
static void gate_up_expert(const GateUpArgs& args, int expert, Range blocks, const Work& work) {
  const int begin = args.routing.offsets[expert], rows = args.routing.offsets[expert + 1] - begin;
  const Rows input{args.input, args.input_stride, args.routing.rows + begin};
  const Blocks w{args.experts + expert * args.expert_stride, int64_t(args.pairs) * kLine, kLine, args.pairs};
  const auto activate = [&](auto& acc, int row, int block) {
    constexpr int MR = sizeof acc / sizeof acc[0], NB = sizeof acc[0] / sizeof acc[0][0];
    for (int r = 0; r < MR; ++r) {
      bf16* out = args.output + int64_t(begin + row + r) * args.output_stride + block / 2 * kBlock;
      for (int j = 0; j < NB; j += 2) Isa::store_bf16(out + j / 2 * kBlock, Isa::mul(silu(acc[r][j]), acc[r][j + 1]));
    }
  };
  product<2>(input, rows, w, {2 * blocks.first, 2 * blocks.last}, reinterpret_cast<float*>(work.scratch), activate);
}

// The blocks of all active experts laid end to end.
static void gate_up(const GateUpArgs& args, const Step&, const Work& work) {
  for_runs(*args.routing.count * args.blocks, kRunBlocks / 2, work, [&](Range run) {
    for (int at = run.first; at < run.last;) {
      const int expert = args.routing.active[at / args.blocks], first = at % args.blocks;
      const Range blocks{first, least(args.blocks, first + run.last - at)};
      gate_up_expert(args, expert, blocks, work);
      at += blocks.last - blocks.first;
    }
  });
}

// Columns of one expert's down, weighted and added to the rows it belongs to.
static void down_expert(const DownArgs& args, int expert, Range blocks, const Work& work) {
  const Routing& routing = args.routing;
  const int begin = routing.offsets[expert], rows = routing.offsets[expert + 1] - begin;
  const Rows input{args.input + int64_t(begin) * args.input_stride, args.input_stride, nullptr};
  const Blocks w{args.experts + expert * args.expert_stride, int64_t(args.pairs) * kLine, kLine, args.pairs};
  const auto add = [&](auto& acc, int row, int block) {
    constexpr int MR = sizeof acc / sizeof acc[0], NB = sizeof acc[0] / sizeof acc[0][0];
    for (int r = 0; r < MR; ++r) {
      const int sorted = begin + row + r;
      const F32 weight = Isa::set(routing.weights[sorted]);
      float* out = args.output + int64_t(routing.rows[sorted]) * args.output_stride + block * kBlock;
      for (int j = 0; j < NB; ++j, out += kBlock) Isa::store(out, Isa::fma(weight, acc[r][j], Isa::load(out)));
    }
  };
  product<1>(input, rows, w, blocks, reinterpret_cast<float*>(work.scratch), add);
}

// Threads share the output columns and take the experts in ascending order: sums need no lock and have one order.
static void down(const DownArgs& args, const Step&, const Work& work) {
  for_runs(args.blocks, kRunBlocks, work, [&](Range run) {
    for (int i = 0; i < *args.routing.count; ++i) down_expert(args, args.routing.active[i], run, work);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
