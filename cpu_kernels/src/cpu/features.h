// What this machine can execute: CPUID, what the operating system saves on a context switch (XCR0), and for AMX its
// permission, which the first call asks for.
#pragma once

#include <string>

#include "executor/step.h"

namespace hybrid {

// Whether this machine has a feature, in the spelling of /proc/cpuinfo. "amx_permission" is absent only where the
// processor has tiles and the kernel refuses them. Throws std::out_of_range for one that no instruction set needs.
bool has_feature(const std::string& name);

// What `reading` is best set to.
Reading suited_reading();

}  // namespace hybrid
