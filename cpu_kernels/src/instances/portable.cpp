#define HYBRID_ISA portable
#include "isa/portable.h"

namespace hybrid::HYBRID_ISA {
using Isa = Portable;
}

#include "ops/kernels.h"

namespace hybrid {
extern const KernelTable kernels_portable;
const KernelTable kernels_portable = portable::make_table("portable");
}  // namespace hybrid
