// The kernel tables of all instruction sets, and what each needs of the processor.
#pragma once

#include <string>
#include <vector>

#include "executor/ops.h"

namespace hybrid {

// Those that run here, best first.
std::vector<const KernelTable*> available_tables();

// The features that `isa` needs and this machine lacks, as `has_feature` calls them. This and the following throw
// std::invalid_argument that lists the known names if `isa` is none of them.
std::vector<std::string> missing_features(const std::string& isa);

// The table of `isa`. Throws std::invalid_argument that names what is missing.
const KernelTable& table_of(const std::string& isa);

// The sizes of `isa`, whether or not it runs here.
const ProductSizes& sizes_of(const std::string& isa);

}  // namespace hybrid
