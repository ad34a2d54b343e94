#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

// Token embeddings are columns of a packed matrix (one matrix serves a tied head too): one pair from every line.
static void embed(const EmbedArgs& args, const Step& step, const Work& work) {
  for_each(step.rows, 1, work, [&](int row) {
    const int token = step.tokens[row];
    const char* column = args.table + int64_t(token / kBlock) * args.pairs * kLine + token % kBlock * 4;
    float* out = args.output + int64_t(row) * args.output_stride;
    for (int i = 0; i < args.hidden; ++i) {
      const char* at = column + int64_t(i / 2) * kLine + i % 2 * 2;
      bf16 half;
      __builtin_memcpy(&half, at, sizeof half);
      const uint32_t bits = uint32_t(half) << 16;
      __builtin_memcpy(out + i, &bits, sizeof bits);
      out[i] *= args.scale;
    }
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
