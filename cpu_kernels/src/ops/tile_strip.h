// What tiles multiply of the rows: 32 at a time over one panel, copied in the order of tiles. Such a strip is 16 KiB
// and stays in the first-level cache while blocks of weights pass through it from the second. Rows are copied once for
// all blocks of a product.
#pragma once

#include "ops/tiles.h"

namespace hybrid {
namespace HYBRID_ISA {

static_assert(kStripRows == 2 * kTileRows);

// Inputs of a panel: 512 bytes of a row.
template <class Format>
constexpr int kTilePanelInputs = Format::integer ? 2 * kPanelInputs : kPanelInputs;

constexpr int kTileBytes = kTileRows * kLine;

template <class Format>
constexpr int kPanelTiles = kTilePanelInputs<Format> * 4 / Format::step_inputs / kLine;  // of 16 rows

// Whether sums of a segment start at a number of the row: where weights have an offset.
template <class Format>
constexpr bool kStarts = Format::integer && !Format::has_signs;

// Of 32 rows, what their sums of inputs [256 * k, 256 * (k + 1)) of a panel are scaled by and start at.
template <class Format>
struct RowTerms {
  static constexpr int count = kTilePanelInputs<Format> / kScaleInputs;
  float scales[count][kStripRows];
  int starts[count][kStripRows];
};

struct NoTerms {};

template <class Format>
constexpr bool kGroupedRows = false;  // int8 values with a scale for 32 of them, which become bf16
template <>
constexpr bool kGroupedRows<TiledGroups> = true;

static HYBRID_INLINE void open_row_group(const char* row, int inputs, int input, bf16* to) {
  static_assert(kRowGroup == 2 * kBlock);
  const F32 scale = Isa::set(reinterpret_cast<const RowGroup*>(row + inputs)[input / kRowGroup].scale);
  for (int i = 0; i < kRowGroup; i += kBlock) Isa::store_bf16(to + i, Isa::mul(Isa::from_int8(row + input + i), scale));
}

// Rows [row, row + count) of `rows` over stored lines [first, last) of `inputs` inputs.
template <class Format>
class Strip {
 public:
  HYBRID_INLINE void fill(const Rows& rows, int row, int count, int inputs, int first, int last) {
    const int tiles = (last - first) * Format::steps / kTileLines;
    for (int r = 0; r < (count > kTileRows ? kStripRows : kTileRows); ++r) {
      char* to = values_ + r / kTileRows * distance + r % kTileRows * kLine;
      if (r < count) {
        const char* const values = rows.at(row + r);
        for (int t = 0; t < tiles; ++t, to += kTileBytes)
          copy(values, inputs, first * Format::steps + t * kTileLines, to);
        if constexpr (Format::integer) fill_terms(values, r, inputs, first, last);
      } else {
        for (int t = 0; t < tiles; ++t, to += kTileBytes) __builtin_memset(to, 0, kLine);
        if constexpr (Format::integer) clear_terms(r);
      }
    }
  }
  // Tile `tile` of the first 16 rows; that of the next 16 lies `distance` bytes behind it.
  HYBRID_INLINE const char* tile(int tile) const { return values_ + tile * kTileBytes; }
  static constexpr int distance = kPanelTiles<Format> * kTileBytes;

 private:
  // What a row has for the 16 operands of a tile, from the `step`-th on.
  static HYBRID_INLINE void copy(const char* values, int inputs, int step, char* to) {
    if constexpr (kGroupedRows<Format>)
      open_row_group(values, inputs, step * Format::step_inputs, reinterpret_cast<bf16*>(to));
    else
      __builtin_memcpy(to, values + 4 * step, kLine);
  }
  HYBRID_INLINE void fill_terms(const char* values, int r, int inputs, int first, int last) {
    for (int k = 0, input = first * Format::line_inputs; input < last * Format::line_inputs;
         ++k, input += kScaleInputs) {
      terms.scales[k][r] = Format::row_scale(values, inputs, input);
      if constexpr (kStarts<Format>) terms.starts[k][r] = Format::start_sum(values, inputs, input);
    }
  }
  HYBRID_INLINE void clear_terms(int r) {
    for (int k = 0; k < RowTerms<Format>::count; ++k) terms.scales[k][r] = terms.starts[k][r] = 0;
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
  return {sizeof(Strip<Tiled<Format>>), kTilePanelInputs<Tiled<Format>>};
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
