// Ops as methods of the executor, and the structs that their fields are made of.
#pragma once

#include <nanobind/nanobind.h>

#include "executor/executor.h"

namespace hybrid {

void bind_ops(nanobind::module_& m, nanobind::class_<Executor>& executor);

}  // namespace hybrid
