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
          embed,
          norm,
          quantise,
          {gemm<Bf16>, gemm<Int8>, gemm<Int4>, gemm<Fp8>, gemm<Mxfp4>},
          qkv,
          attention,
          merge,
          router,
          topk,
          gate_up,
          down,
          join_nodes,
          combine,
          read,
          multiply<Bf16>,
          multiply<Int8>};
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
