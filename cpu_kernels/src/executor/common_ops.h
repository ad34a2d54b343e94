// Ops that are the same for every instruction set.
#pragma once

#include "executor/ops.h"

namespace hybrid {

// Cosines and sines of every row's position, once a step for all layers.
void rope_table(const RopeTableArgs& args, const Step& step, const Work& work);

// Sorts (row, expert) pairs by expert.
void group(const GroupArgs& args, const Step& step, const Work& work);

}  // namespace hybrid
