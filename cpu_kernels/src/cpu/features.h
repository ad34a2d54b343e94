// What this machine can execute: CPUID, what the operating system saves on a context switch (XCR0), and for AMX its
// permission, which the first call asks for.
#pragma once

#include <string>
#include <vector>

#include "executor/args.h"

namespace hybrid {

// Kernel tables that run here, best first.
std::vector<const KernelTable*> available_tables();

// The features that `isa` needs and this machine lacks, in the spelling of /proc/cpuinfo; "amx_permission" where the
// processor has tiles and the kernel refuses them. Throws std::invalid_argument that lists the known names if `isa` is
// none of them.
std::vector<std::string> missing_features(const std::string& isa);

// What `fetch_near` is best set to.
bool should_fetch_near();

// The table of `isa`. Throws std::invalid_argument that names what is missing.
const KernelTable& table_of(const std::string& isa);

}  // namespace hybrid
