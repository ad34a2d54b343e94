// Experts in two passes over the rows sorted by expert: gate, up and activation; then down, weighted and summed. The
// shared expert goes along in both. A dense feed-forward is the same with one expert.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

// gpt-oss: gate at most 7, up within 7; gate * sigmoid(1.702 gate) * (up + 1).
static HYBRID_INLINE F32 swiglu_clamped(F32 gate, F32 up) {
  const F32 limit = Isa::set(7.0f), slope = Isa::set(1.702f);
  const F32 g = unless_damaged(min(gate, limit), gate);
  const F32 u = unless_damaged(Isa::max(min(up, limit), Isa::set(-7.0f)), up);
  const F32 swish = Isa::div(silu(Isa::mul(g, slope)), slope);
  return Isa::mul(swish, Isa::add(u, Isa::set(1.0f)));
}

// Of DeepSeek-V4: gate at most 10, up within 10; silu(gate) * up.
static HYBRID_INLINE F32 silu_clamped(F32 gate, F32 up) {
  const F32 limit = Isa::set(10.0f);
  const F32 g = unless_damaged(min(gate, limit), gate);
  return Isa::mul(silu(g), unless_damaged(Isa::max(min(up, limit), Isa::set(-10.0f)), up));
}

// Ling 3.0, in its last layers: silu of the gate at most the bound, up within it.
static HYBRID_INLINE F32 silu_bounded(F32 gate, F32 up, F32 bound) {
  const F32 g = unless_damaged(min(silu(gate), bound), gate);
  return Isa::mul(g, unless_damaged(Isa::max(min(up, bound), Isa::sub(Isa::zero(), bound)), up));
}

static HYBRID_INLINE F32 relu_squared(F32 x) {
  const F32 positive = Isa::max(Isa::zero(), x);
  return unless_damaged(Isa::mul(positive, positive), x);
}

// up: of no meaning without a gate.
static HYBRID_INLINE F32 activate(Activation kind, float bound, F32 gate, F32 up) {
  if (kind == Activation::relu_squared) return relu_squared(gate);
  if (bound > 0) return silu_bounded(gate, up, Isa::set(bound));
  if (kind == Activation::gelu_tanh) return Isa::mul(gelu_tanh(gate), up);
  if (kind == Activation::silu_clamped) return silu_clamped(gate, up);
  return kind == Activation::silu ? Isa::mul(silu(gate), up) : swiglu_clamped(gate, up);
}

// What gate_up needs beside the matrices.
struct Activations {
  bf16* rows;
  int stride;
  Activation kind;
  float bound;
  int matrices = is_gated(kind) ? 2 : 1;  // whose blocks lie in turn
};

// Blocks [first, last) of one expert's gate and up, or of up alone, for the rows that go to it.
template <class Format>
static HYBRID_KERNEL void gate_up_expert(const Tiles<Format>& tiles, const ExpertSet& set, const Activations& to,
                                         int expert, Range blocks, const Work& work) {
  const int begin = set.routing.offsets[expert], rows = set.routing.offsets[expert + 1] - begin;
  const Rows input{set.input, set.input_stride, set.routing.rows + begin};
  const int each = to.matrices;
  const float* bias = set.bias ? set.bias + int64_t(expert) * set.blocks * each * kBlock : nullptr;
  const auto finish = [&](const Sums& sums, Range some_rows, int block, int group) {
    for (int row = some_rows.first; row < some_rows.last; ++row) {
      bf16* out = to.rows + int64_t(begin + row) * to.stride + block / each * kBlock;
      for (int j = 0; j < group; j += each, out += kBlock) {
        F32 gate = sums.at(row - some_rows.first, j), up = sums.at(row - some_rows.first, j + each - 1);
        if (bias) {
          gate = Isa::add(gate, Isa::load(bias + (block + j) * kBlock));
          up = Isa::add(up, Isa::load(bias + (block + j + each - 1) * kBlock));
        }
        Isa::store_bf16(out, activate(to.kind, to.bound, gate, up));
      }
    }
  };
  product(tiles, input, rows, set.experts + expert * set.expert_stride, set.inputs,
          {each * blocks.first, each * blocks.last}, work.scratch, finish);
}

// The blocks of all active experts of a set laid end to end.
template <class Format>
static HYBRID_KERNEL void gate_up_set(Format format, const ExpertSet& set, const Activations& to, const Step& step,
                                      const Work& work) {
  const Tiles<Format> tiles(format, step, step.rows);
  for_shares(*set.routing.count * set.blocks, kRunBlocks / 2, work, [&](Range run) {
    while (run.first < run.last) {
      const int expert = set.routing.active[run.first / set.blocks], first = run.first % set.blocks;
      const Range blocks{first, min(set.blocks, first + run.last - run.first)};
      gate_up_expert(tiles, set, to, expert, blocks, work);
      run.first += blocks.last - blocks.first;
    }
  });
}

// A thread that finds no more blocks of the routed experts goes on with the shared one.
static void gate_up(const GateUpArgs& args, const Step& step, const Work& work) {
  const Activations routed{args.output, args.output_stride, args.activation, args.bound};
  with_format(args.routed.format, [&](auto format) { gate_up_set(format, args.routed, routed, step, work); });
  if (!args.shared.experts) return;
  const Activations shared{args.shared_output, args.shared_output_stride, args.activation, args.shared_bound};
  const Work then = work.second();
  with_format(args.shared.format, [&](auto format) { gate_up_set(format, args.shared, shared, step, then); });
}

// Columns of one expert's down, weighted and added to the rows it belongs to.
template <class Format>
static HYBRID_KERNEL void down_expert(const Tiles<Format>& tiles, const ExpertSet& set, const DownArgs& args,
                                      int expert, Range blocks, const Work& work) {
  const Routing& routing = set.routing;
  const int begin = routing.offsets[expert], rows = routing.offsets[expert + 1] - begin;
  const Rows input{set.input + begin * set.input_stride, set.input_stride, nullptr};
  const float* bias = set.bias ? set.bias + int64_t(expert) * set.blocks * kBlock : nullptr;
  const auto add = [&](const Sums& sums, Range some_rows, int block, int group) {
    for (int row = some_rows.first; row < some_rows.last; ++row) {
      const int sorted = begin + row;
      const F32 weight = Isa::set(routing.weights[sorted]);
      float* out = args.output + int64_t(routing.rows[sorted]) * args.output_stride + block * kBlock;
      for (int j = 0; j < group; ++j, out += kBlock) {
        F32 value = sums.at(row - some_rows.first, j);
        if (bias) value = Isa::add(value, Isa::load(bias + (block + j) * kBlock));
        Isa::store(out, Isa::fma(weight, value, Isa::load(out)));
      }
    }
  };
  product(tiles, input, rows, set.experts + expert * set.expert_stride, set.inputs, blocks, work.scratch, add);
}

// Columns of every active expert of a set, in ascending order.
template <class Format>
static HYBRID_INLINE void down_experts(const Tiles<Format>& tiles, const ExpertSet& set, const DownArgs& args,
                                       Range blocks, const Work& work) {
  for (int i = 0; i < *set.routing.count; ++i) down_expert(tiles, set, args, set.routing.active[i], blocks, work);
}

template <class Format>
static HYBRID_KERNEL void down_routed(Format format, const DownArgs& args, const Step& step, const Work& work) {
  const Tiles<Format> tiles(format, step, step.rows);
  for_shares(args.routed.blocks, kRunBlocks, work,
             [&](Range run) { down_experts(tiles, args.routed, args, run, work); });
}

template <class Format>
static HYBRID_KERNEL void down_run(Format format, const ExpertSet& set, const DownArgs& args, Range run,
                                   const Step& step, const Work& work) {
  const Tiles<Format> tiles(format, step, step.rows);
  down_experts(tiles, set, args, run, work);
}

// Threads share the output columns and take the experts in ascending order, the shared one last: sums need no lock and
// have one order. Two sets take turns run by run, each with tiles of its own.
static void down(const DownArgs& args, const Step& step, const Work& work) {
  if (!args.shared.experts)
    return with_format(args.routed.format, [&](auto format) { down_routed(format, args, step, work); });
  for_shares(args.routed.blocks, kRunBlocks, work, [&](Range run) {
    const auto add = [&](const ExpertSet& set) {
      with_format(set.format, [&](auto format) { down_run(format, set, args, run, step, work); });
    };
    add(args.routed);
    add(args.shared);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
