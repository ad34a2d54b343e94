// Lines turned around, for instruction sets without wide shuffles.
#pragma once

#include "executor/step.h"

namespace hybrid {
namespace HYBRID_ISA {

// Eight lines of 16 columns by pairs of inputs as eight lines of 16 inputs by pairs of columns. Two inputs of two
// columns are a word: its middle parts change places, and words i of line p and p of line i do.
static inline void turn_words(const char* lines, char* out) {
  for (int i = 0; i < 8; ++i) {
    for (int p = 0; p < 8; ++p) {
      uint64_t word;
      __builtin_memcpy(&word, lines + i * kLine + p * 8, sizeof word);
      word = (word & 0xffff00000000ffff) | (word & 0xffff0000) << 16 | (word >> 16 & 0xffff0000);
      __builtin_memcpy(out + p * kLine + i * 8, &word, sizeof word);
    }
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
