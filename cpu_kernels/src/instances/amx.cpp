#define HYBRID_ISA amx
#include "isa/amx.h"

namespace hybrid::HYBRID_ISA {
using Isa = Amx;
}

#include "ops/kernels.h"
#include "ops/small_tiles.h"

namespace hybrid {
extern const KernelTable kernels_amx;
const KernelTable kernels_amx = amx::make_table("amx");
}  // namespace hybrid
