#pragma once

#include <vector>

#include "executor/step.h"

namespace hybrid {

// Cuts the rows of a step into attention tiles and their tasks. Allocates once.
class Schedule {
 public:
  // heads: query heads, group: those of a KV head; both the largest of all layers.
  Schedule(int max_rows, int heads, int group);
  // Fills the tile fields of `step` from its sequences and positions.
  void build(Step& step);

 private:
  void add(const Step& step, int row, int rows, bool split);

  int heads_, tile_rows_;
  int tasks_ = 0;
  int splits_ = 0;
  int64_t states_ = 0;
  std::vector<AttentionTile> tiles_;
};

}  // namespace hybrid
