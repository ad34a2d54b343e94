#define HYBRID_ISA amx
#include "isa/amx.h"

namespace hybrid::HYBRID_ISA {
using Isa = Amx;
}

#include "ops/small_tiles.h"
#include "ops/tile_product.h"
// What plans need is known of tiles by now.
#include "ops/kernels.h"

namespace hybrid {
extern const KernelTable kernels_amx;
const KernelTable kernels_amx = amx::make_table("amx");
}  // namespace hybrid
