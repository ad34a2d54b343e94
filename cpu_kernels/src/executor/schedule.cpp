#include "executor/schedule.h"

#include <algorithm>

#include "executor/scratch.h"

namespace hybrid {

Schedule::Schedule(int max_rows, int heads, int group) : heads_(heads), tile_rows_(attention_tile_rows(group)) {
  tiles_.reserve(size_t(max_rows));
}

void Schedule::add(const Step& step, int row, int rows, bool split) {
  const int position = step.positions[row], blocks = position / kKeys + 1;
  tiles_.push_back({row, rows, step.sequences[row], position, split, tasks_, states_});
  tasks_ += split ? blocks : 1;
  splits_ += split;
  if (split) states_ += blocks;
}

void Schedule::build(Step& step) {
  tiles_.clear();
  tasks_ = splits_ = 0;
  states_ = 0;
  const bool many = int64_t(step.rows) * heads_ >= int64_t(kManyTiles) * kAttentionRows;
  const int tile_rows = many ? tile_rows_ : std::max(1, tile_rows_ / 2);
  for (int first = 0; first < step.rows;) {
    int last = first + 1;
    while (last < step.rows && step.sequences[last] == step.sequences[first]) ++last;
    const bool split = last - first == 1 && step.positions[first] >= kKeys;
    for (int row = first; row < last; row += tile_rows) add(step, row, std::min(tile_rows, last - row), split);
    first = last;
  }
  step.tiles = tiles_.data();
  step.tile_count = int(tiles_.size());
  step.attention_tasks = tasks_;
  step.split_tiles = splits_;
}

}  // namespace hybrid
