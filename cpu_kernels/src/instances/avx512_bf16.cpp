#define HYBRID_ISA avx512_bf16
#include "isa/avx512_bf16.h"

namespace hybrid::HYBRID_ISA {
using Isa = Avx512Bf16;
}

#include "ops/kernels.h"

namespace hybrid {
extern const KernelTable kernels_avx512_bf16;
const KernelTable kernels_avx512_bf16 = avx512_bf16::make_table("avx512_bf16");
}  // namespace hybrid
