// What can be known to be wrong with an op before it runs.
#pragma once

#include "executor/executor.h"
#include "executor/field_check.h"

namespace hybrid {

// Throws std::invalid_argument, that names the op and what is wrong, where a field breaks its rule or fields do not fit
// each other.
void check_op(const OpArgs& args, Addresses addresses);

// Throws std::invalid_argument where an op, which must have been checked, does not fit the extents of steps.
void check_extents(const OpArgs& args, const Limits& limits);

// As Python calls it.
const char* name_of(const OpArgs& args);

// Per thread, in a step of at most `rows` rows. The op must have been checked.
int64_t op_scratch_bytes(const OpArgs& args, const ProductSizes& sizes, int rows);

}  // namespace hybrid
