#define HYBRID_ISA avx512
#include "isa/avx512.h"

namespace hybrid::HYBRID_ISA {
using Isa = Avx512;
}

#include "ops/kernels.h"

namespace hybrid {
extern const KernelTable kernels_avx512;
const KernelTable kernels_avx512 = avx512::make_table("avx512");
}  // namespace hybrid
