#define HYBRID_ISA avx2
#include "isa/avx2.h"

namespace hybrid::HYBRID_ISA {
using Isa = Avx2;
}

#include "ops/kernels.h"

namespace hybrid {
extern const KernelTable kernels_avx2;
const KernelTable kernels_avx2 = avx2::make_table("avx2");
}  // namespace hybrid
