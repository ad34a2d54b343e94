// All ops of one instruction set. An instance defines HYBRID_ISA and `Isa`, then includes this.
#pragma once

#include "ops/attention.h"
#include "ops/combine.h"
#include "ops/embedding.h"
#include "ops/gemm.h"
#include "ops/join.h"
#include "ops/moe.h"
#include "ops/norm.h"
#include "ops/probe.h"
#include "ops/qkv.h"
#include "ops/quantise.h"
#include "ops/router.h"

namespace hybrid {
namespace HYBRID_ISA {

static constexpr KernelTable make_table(const char* name) {
  return {name,
          {Isa::max_blocks,
           Isa::has_tiles,
           {Bf16::opened, Int8::opened, Int4::opened, Fp8::opened, Mxfp4::opened},
           {Bf16::step_inputs, Int8::step_inputs, Int4::step_inputs, Fp8::step_inputs, Mxfp4::step_inputs}},
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
