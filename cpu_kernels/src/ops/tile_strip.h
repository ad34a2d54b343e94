// What tiles multiply of the rows: 32 at a time over one panel, copied in the order of tiles. Such a strip is 16 KiB
// and stays in the first-level cache while blocks of weights pass through it from the second. Rows are copied once for
// all blocks of a product.
#pragma once

#include "ops/tiles.h"

namespace hybrid {
namespace HYBRID_ISA {

static_assert(kStripRows == 2 * kTileRows);

// Inputs of a panel: 512 bytes of a row, or 256 where segments are a half or a quarter of a tile.
template <class Format>
constexpr int kTilePanelInputs = Format::integer && !Format::opened_groups ? 2 * kPanelInputs : kPanelInputs;

template <class Format>
constexpr int kTileRowBytes = 4 * kTileLines<Format>;  // of a row in one tile

template <class Format>
constexpr int kTileBytes = kTileRows * kTileRowBytes<Format>;

template <class Format>
constexpr int kPanelTiles = kTilePanelInputs<Format> * 4 / Format::step_inputs / kTileRowBytes<Format>;  // of 16 rows

// Whether sums of a segment start at a number of the row: where weights have an offset.
template <class Format>
constexpr bool kStarts = Format::integer && !Format::opened_groups && !Format::has_signs;

// Stored lines for which a row has terms of its own: those of a segment of groups, else 256 inputs of int8.
template <class Format>
constexpr int kTermLines = Format::opened_groups ? Format::segment : kScaleInputs / Format::line_inputs;

// Of 32 rows, what their sums of stored lines [k * kTermLines, (k + 1) * kTermLines) of a panel are scaled by and start
// at; or for codes in groups the scaled sum of the inputs, which minima are multiplied by.
template <class Format>
struct RowTerms {
  static constexpr int count = kTilePanelInputs<Format> / Format::line_inputs / kTermLines<Format>;
  float scales[count][kStripRows], sums[count][kStripRows];
  int starts[count][kStripRows];
};

struct NoTerms {};

// Rows [row, row + count) of `rows` over stored lines [first, last) of `inputs` inputs.
template <class Format>
class Strip {
 public:
  HYBRID_INLINE void fill(const Rows& rows, int row, int count, int inputs, int first, int last) {
    constexpr int width = kTileRowBytes<Format>;
    const int tiles = (last - first) * 4 * Format::steps / width;
    for (int r = 0; r < (count > kTileRows ? kStripRows : kTileRows); ++r) {
      char* to = values_ + r / kTileRows * distance + r % kTileRows * width;
      if (r < count) {
        const char *const values = rows.at(row + r), *from = values + 4 * Format::steps * first;
        for (int t = 0; t < tiles; ++t, from += width, to += kTileBytes<Format>) __builtin_memcpy(to, from, width);
        if constexpr (Format::integer) fill_terms(values, r, inputs, first, last);
      } else {
        for (int t = 0; t < tiles; ++t, to += kTileBytes<Format>) __builtin_memset(to, 0, width);
        if constexpr (Format::integer) clear_terms(r);
      }
    }
  }
  // Tile `tile` of the first 16 rows; that of the next 16 lies `distance` bytes behind it.
  HYBRID_INLINE const char* tile(int tile) const { return values_ + tile * kTileBytes<Format>; }
  static constexpr int distance = kPanelTiles<Format> * kTileBytes<Format>;

 private:
  HYBRID_INLINE void fill_terms(const char* values, int r, int inputs, int first, int last) {
    for (int k = 0, line = first; line < last; ++k, line += kTermLines<Format>) {
      const int input = line * Format::line_inputs;
      if constexpr (Format::opened_groups) {
        const RowGroup group = Format::row_group(values, inputs, line);
        terms.scales[k][r] = group.scale;
        terms.sums[k][r] = group.sum;
      } else {
        terms.scales[k][r] = Format::row_scale(values, inputs, input);
        if constexpr (kStarts<Format>) terms.starts[k][r] = Format::start_sum(values, inputs, input);
      }
    }
  }
  HYBRID_INLINE void clear_terms(int r) {
    for (int k = 0; k < RowTerms<Format>::count; ++k) terms.scales[k][r] = terms.sums[k][r] = terms.starts[k][r] = 0;
  }

  alignas(kLine) char values_[2 * distance];

 public:
  typename Either<Format::integer, RowTerms<Format>, NoTerms>::Type terms;
};

// The strips of a band of rows, those of a panel one after the other.
template <class Format>
struct Strips {
  Strip<Format>* data;
  int count;  // of a panel

  HYBRID_INLINE Strip<Format>& at(int panel, int strip) const { return data[panel * count + strip]; }
};

template <class Format>
static HYBRID_KERNEL void fill_strips(const Strips<Format>& strips, const Rows& rows, Range band, int inputs) {
  constexpr int width = kTilePanelInputs<Format>;
  for (int strip = 0; strip < strips.count; ++strip) {
    const int row = band.first + strip * kStripRows, count = min(kStripRows, band.last - row);
    for (int panel = 0; panel * width < inputs; ++panel) {
      const int first = panel * width, last = min(inputs, first + width);
      strips.at(panel, strip).fill(rows, row, count, inputs, first / Format::line_inputs, last / Format::line_inputs);
    }
  }
}

// Declared in ops/tile_use.h.
template <class Format>
static constexpr StripSize strip_size() {
  if constexpr (Format::grouped) {
    static_assert(kTilePanelInputs<OpenedGroups<16>> == kTilePanelInputs<OpenedGroups<32>>);
    constexpr int64_t narrow = sizeof(Strip<OpenedGroups<16>>), wide = sizeof(Strip<OpenedGroups<32>>);
    return {narrow > wide ? narrow : wide, kTilePanelInputs<OpenedGroups<16>>};
  } else {
    return {sizeof(Strip<Tiled<Format>>), kTilePanelInputs<Tiled<Format>>};
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
