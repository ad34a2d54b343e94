// Dense projections and the output head.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

template <class Format>
static HYBRID_KERNEL void gemm_rows(Format format, const GemmArgs& args, const Step& step, const Work& work) {
  const bool head = args.output == nullptr;
  const int rows = head ? step.logit_rows : step.rows;
  float* const output = head ? step.logits + args.first_column : args.output;
  const Rows input{args.input, args.input_stride, nullptr};
  const Tiles<Format> tiles(format, step, rows);
  const auto finish = [&](const Sums& sums, Range some_rows, int block, int blocks) {
    for (int row = some_rows.first; row < some_rows.last; ++row) {
      for (int j = 0; j < blocks; ++j) {
        const int column = (block + j) * kBlock, some = min(kBlock, args.columns - column);
        float* out = output + int64_t(row) * args.output_stride + column;
        F32 value = sums.at(row - some_rows.first, j);
        if (args.bias) value = Isa::add(value, load_some(args.bias + column, some));
        value = Isa::mul(value, Isa::set(args.scale));
        if (args.accumulate) value = Isa::add(value, load_some(out, some));
        store_some(out, value, some);
      }
    }
  };
  for_shares((args.columns + kBlock - 1) / kBlock, kRunBlocks, work,
             [&](Range run) { product(tiles, input, rows, args.weight, args.inputs, run, work.scratch, finish); });
}

static void gemm(const GemmArgs& args, const Step& step, const Work& work) {
  with_format(args.format, [&](auto format) { gemm_rows(format, args, step, work); });
}

// A task is some blocks of one head.
template <class Format>
static HYBRID_KERNEL void head_gemm_rows(Format format, const HeadGemmArgs& args, const Step& step, const Work& work) {
  const int blocks = (args.columns + kBlock - 1) / kBlock, runs = (blocks + kRunBlocks - 1) / kRunBlocks;
  const Tiles<Format> tiles(format, step, step.rows);
  const auto multiply = [&](int task) {
    const int head = task / runs, first = task % runs * kRunBlocks;
    const Rows input{args.input + head * args.input_head_stride, args.input_stride, nullptr};
    bf16* const output = args.output + int64_t(head) * args.output_head_stride;
    const auto finish = [&](const Sums& sums, Range some_rows, int block, int together) {
      for (int row = some_rows.first; row < some_rows.last; ++row) {
        for (int j = 0; j < together; ++j) {
          const int column = (block + j) * kBlock;
          store_some_bf16(output + int64_t(row) * args.output_stride + column, sums.at(row - some_rows.first, j),
                          min(kBlock, args.columns - column));
        }
      }
    };
    product(tiles, input, step.rows, args.weight + head * args.weight_head_stride, args.inputs,
            {first, min(blocks, first + kRunBlocks)}, work.scratch, finish);
  };
  for_shares(args.heads * runs, 1, work, [&](Range run) {
    for (int task = run.first; task < run.last; ++task) multiply(task);
  });
}

static void head_gemm(const HeadGemmArgs& args, const Step& step, const Work& work) {
  with_format(args.format, [&](auto format) { head_gemm_rows(format, args, step, work); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
