// Dense projections and the output head.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

static void gemm(const GemmArgs& args, const Step& step, const Work& work) {
  const bool head = args.output == nullptr;
  const int rows = head ? step.logit_rows : step.rows;
  float* const output = head ? step.logits : args.output;
  const Rows input{args.input, args.input_stride, nullptr};
  const Blocks w{args.weight, int64_t(args.pairs) * kLine, kLine, args.pairs};
  const auto finish = [&](auto& acc, int row, int block) {
    constexpr int MR = sizeof acc / sizeof acc[0], NB = sizeof acc[0] / sizeof acc[0][0];
    for (int r = 0; r < MR; ++r) {
      for (int j = 0; j < NB; ++j) {
        const int column = (block + j) * kBlock, count = least(kBlock, args.columns - column);
        float* out = output + int64_t(row + r) * args.output_stride + column;
        F32 value = acc[r][j];
        if (args.bias) value = Isa::add(value, load_some(args.bias + column, count));
        if (args.accumulate) value = Isa::add(value, load_some(out, count));
        store_some(out, value, count);
      }
    }
  };
  for_runs((args.columns + kBlock - 1) / kBlock, kRunBlocks, work,
           [&](Range run) { product<1>(input, rows, w, run, reinterpret_cast<float*>(work.scratch), finish); });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
