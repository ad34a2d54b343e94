// What the ops of mixers work on that keep a state of one size for a sequence, instead of keys and values.
#pragma once

#include "executor/rule.h"

namespace hybrid {

// The state of a layer: that of sequence s is at base + s * sequence_stride, zero before its first token.
struct StateLayout {
  char* base;
  int64_t sequence_stride;

  template <class Field>
  void fields(Field& field) {
    field("base", base, kLines);
    field("sequence_stride", sequence_stride, kLines);
  }
};

// As HYBRID_ROW_OPS.
#define HYBRID_STATE_OPS(OP)

}  // namespace hybrid
