// All ops of one instruction set. An instance defines HYBRID_ISA and `Isa`, then includes this.
#pragma once

#include "ops/attention.h"
#include "ops/block_index.h"
#include "ops/combine.h"
#include "ops/embedding.h"
#include "ops/entries.h"
#include "ops/fp4_product.h"
#include "ops/gate.h"
#include "ops/gated_delta.h"
#include "ops/gemm.h"
#include "ops/grouped_product.h"
#include "ops/index.h"
#include "ops/join.h"
#include "ops/kimi_delta.h"
#include "ops/latent.h"
#include "ops/moe.h"
#include "ops/ngram.h"
#include "ops/norm.h"
#include "ops/probe.h"
#include "ops/qkv.h"
#include "ops/quantise.h"
#include "ops/router.h"
#include "ops/seen_attention.h"
#include "ops/short_conv.h"
#include "ops/soft_cap.h"
#include "ops/state_space.h"
#include "ops/streams.h"
#include "ops/turn.h"

namespace hybrid {
namespace HYBRID_ISA {

static constexpr ProductSizes product_sizes() {
  ProductSizes sizes{Isa::max_blocks, {}, {}};
  for (int i = 0; i < kFormats; ++i) {
    with_format(hybrid::Format(i), [&](auto format) {
      using Format = decltype(format);
      sizes.opened[i] = Format::opened;
      if constexpr (Isa::has_tiles && Format::tiled) sizes.strips[i] = strip_size<Format>();
    });
  }
  return sizes;
}

static constexpr KernelTable make_table(const char* name) {
  return {name,
          product_sizes(),
#define HYBRID_KERNEL_OF_OP(op, Args) op,
          HYBRID_KERNEL_OPS(HYBRID_KERNEL_OF_OP)
#undef HYBRID_KERNEL_OF_OP
              merge,
          read,
          multiply<Bf16>,
          multiply<Int8>};
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
