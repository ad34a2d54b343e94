// Products on matrix tiles. Blocks of a group take turns over a strip of rows that the first-level cache holds; their
// panel is in the second, and while it is multiplied the next one is read from memory. So a core reads weights once for
// a band of rows, and rows once for a group of blocks.
#pragma once

#include "ops/tile_passes.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kFewRows = 96;  // up to so many memory decides, and panels of fewer blocks begin sooner: measured

// Stored bytes of some blocks that a panel needs: `lines` lines from `at` on, and as many `stride` bytes behind for
// each further block.
struct Stored {
  const char* at;
  int64_t stride;
  int lines;

  HYBRID_INLINE void fetch(int blocks) const {
    for (int j = 0; j < blocks; ++j)
      for (int i = 0; i < lines; ++i) __builtin_prefetch(at + j * stride + int64_t(i) * kLine, 0, 2);
  }
};

// What inputs [first, last) of blocks from the `skipped`-th on need.
template <class Format>
static HYBRID_INLINE Stored stored_lines(const Blocks<Format>& w, int skipped, int first, int last) {
  constexpr int scales = Format::scaled_lines > 0 ? kLine : 0;  // bytes before the first line of a panel
  const char* const from = w.line(first / Format::line_inputs) - scales;
  const char* const to = w.line(last / Format::line_inputs) - scales;
  return {from + skipped * w.stride, w.stride, int((to - from) / kLine)};
}

// The blocks of a group as tiles multiply them; operands() opens a panel if stored lines are none.
template <class Format>
struct TileBlocks {
  using Multiplied = Format;
  static constexpr bool fetches = !Format::opened;  // the next panel while this one is opened
  static constexpr int kScales = Format::scaled_lines > 0 ? kLine : 0;
  Blocks<Format> w;
  char* opened;

  template <class Stored>
  HYBRID_INLINE TileBlocks(const Stored&, const char* matrix, int inputs, int block, char* opened)
      : w(matrix, inputs, block), opened(opened) {}
  HYBRID_INLINE const Blocks<Format>& multiplied() const { return w; }
  HYBRID_INLINE Stored stored(int skipped, int first, int last) const { return stored_lines(w, skipped, first, last); }
  HYBRID_INLINE Lines operands(int blocks, int first, int last, const Stored& next) const {
    const int line = first / Format::line_inputs;
    if constexpr (Format::opened) {
      return w.from(line);
    } else {
      for_block_groups({0, blocks}, [&](auto nb, int j) __attribute__((always_inline)) {
        const Blocks<Format> some = w.behind(j);
        open_panel<Format, nb.value>(some, line, last / Format::line_inputs, next.at + kScales + j * next.stride,
                                     opened + j * kPanelBytes);
      });
      return {opened, kPanelBytes, kLine, nullptr, line};
    }
  }
};

// Inputs [first, last) of a block of int4 as bytes, and a scale for each column and 256 of them. Scales below 2^-100
// are taken for that: weights that small are zero.
static HYBRID_KERNEL void open_int4(const Blocks<Int4>& w, int first, int last, char* out, float* scales) {
  constexpr int lines = Int4::segment;
  for (int input = first; input < last; input += kScaleInputs, scales += kBlock) {
    const int from = input / Int4::line_inputs, to = min(last, input + kScaleInputs) / Int4::line_inputs;
    F32 largest = Isa::set(0x1p-100f);
    for (int line = from; line < to; line += lines)
      largest = Isa::Nibbles::larger(largest, Int4::group_scale(w.header, line));
    Isa::store(scales, Isa::Nibbles::common(largest));
    const F32 inverse = Isa::Nibbles::inverse(largest);
    for (int line = from; line < to; line += lines) {
      const auto factor = Isa::Nibbles::factor(Int4::group_scale(w.header, line), inverse);
      const char* const at = w.line(line);
#pragma GCC unroll 4
      for (int i = 0; i < lines; ++i, out += 2 * kLine) Isa::Nibbles::open(at + i * kLine, factor, out);
    }
  }
}

// The same of int4.
struct TileInt4 {
  using Multiplied = ScaledInt4;
  static constexpr bool fetches = false;
  Blocks<Int4> w;
  Blocks<Multiplied> opened_w;
  char* opened;
  alignas(kLine) mutable float scales[kGroupBlocks][Multiplied::panel_scales][kBlock];

  HYBRID_INLINE TileInt4(const Int4&, const char* matrix, int inputs, int block, char* opened)
      : w(matrix, inputs, block), opened_w(reinterpret_cast<const char*>(scales), inputs, 0), opened(opened) {
    opened_w.stride = sizeof scales[0];
  }
  HYBRID_INLINE const Blocks<Multiplied>& multiplied() const { return opened_w; }
  HYBRID_INLINE Stored stored(int skipped, int first, int last) const { return stored_lines(w, skipped, first, last); }
  HYBRID_INLINE Lines operands(int blocks, int first, int last, const Stored&) const {
    for (int j = 0; j < blocks; ++j) open_int4(w.behind(j), first, last, opened + j * kPanelBytes, scales[j][0]);
    return {opened, kPanelBytes, kLine, nullptr, first / Multiplied::line_inputs};
  }
};

// The blocks of a stored format.
template <class Format>
struct TileGroup {
  using Type = TileBlocks<Tiled<Format>>;
};
template <>
struct TileGroup<Int4> {
  using Type = TileInt4;
};

// Inputs [first, last) of a block of codes in groups as bf16 pairs.
template <int bits, GroupScales scales>
static HYBRID_INLINE void open_group_pairs(const GroupBlocks& w, int first, int last, char* out) {
  constexpr int group = group_inputs(bits);
  const F32 offset = Isa::set(-float(w.layout.offset));
  for (int input = first; input < last; input += kInputs) {
    const char* const part = w.part(input);
#pragma GCC unroll 4
    for (int g = 0; g < kInputs / group; ++g) {
      const OpenedScales opened = open_scale<scales>(part, w.span(input), g, offset);
      const F32 scale = Isa::GroupPairs::factor(opened.scale), start = Isa::GroupPairs::factor(opened.minimum);
      const GroupCodes<bits> codes(part + w.layout.head_bytes(), g * group, w.table());
#pragma GCC unroll 8
      for (int step = 0; step < group / 4; ++step, out += 2 * kLine)
        Isa::GroupPairs::open(codes.operand(0, step), scale, start, out);
    }
  }
}

// The same of some blocks, `kPanelBytes` a block.
static HYBRID_KERNEL void open_group_panels(const GroupBlocks& w, int blocks, int first, int last, char* out) {
  with_codes(w.layout, [&](auto bits, auto kind) __attribute__((always_inline)) {
    for (int j = 0; j < blocks; ++j)
      open_group_pairs<bits.value, decltype(kind)::scales>(w.behind(j), first, last, out + j * kPanelBytes);
  });
}

// The same of codes in groups.
struct TileGroups {
  using Multiplied = TiledGroups;
  static constexpr bool fetches = false;
  GroupBlocks w;
  Blocks<Multiplied> opened_w;
  char* opened;

  HYBRID_INLINE TileGroups(const Grouped& format, const char* matrix, int inputs, int block, char* opened)
      : w(format.layout, matrix, inputs, block), opened_w(opened, inputs, 0), opened(opened) {}
  HYBRID_INLINE const Blocks<Multiplied>& multiplied() const { return opened_w; }
  HYBRID_INLINE Stored stored(int skipped, int first, int last) const {
    return {w.span(first) + skipped * w.stride, w.stride, int((w.part(last) - w.span(first)) / kLine)};
  }
  HYBRID_INLINE Lines operands(int blocks, int first, int last, const Stored&) const {
    open_group_panels(w, blocks, first, last, opened);
    return {opened, kPanelBytes, kLine, nullptr, first / Multiplied::line_inputs};
  }
};

template <>
struct TileGroup<Grouped> {
  using Type = TileGroups;
};

// One strip of rows from `row` of the sums on: some blocks, by TN.
template <class Format, int TM, int TN>
static HYBRID_KERNEL void strip_passes(const TilePanel<Format>& panel, const Strip<Format>& strip, int row,
                                       Range blocks, Ahead& ahead) {
  Passes<Format, TM, TN> passes(panel, strip, row);
  for (int block = blocks.first; block < blocks.last; block += TN) passes.pass(block, ahead);
  passes.finish();
}

// Calls function(Int<TM>, Int<TN>, blocks) for strips of 32 or of 16 rows, with all sums that tiles hold, then fewer.
template <class Function>
static HYBRID_INLINE void for_shapes(int rows, int blocks, Function function) {
  int done = 0;
  const auto run = [&](auto tm, auto tn) __attribute__((always_inline)) {
    const int last = done + (blocks - done) / decltype(tn)::value * decltype(tn)::value;
    if (last > done) function(tm, tn, Range{done, last});
    done = last;
  };
  if (rows > kTileRows) {
    run(Int<2>{}, Int<2>{});
    run(Int<2>{}, Int<1>{});
  } else {
    run(Int<1>{}, Int<4>{});
    run(Int<1>{}, Int<1>{});
  }
}

// A band of rows over one panel of some blocks, strip by strip, and what is fetched meanwhile: of the next panel.
template <class Format>
struct BandPasses {
  const TilePanel<Format>& panel;
  const Strips<Format>& strips;
  int rows, blocks;
  const Stored& next;
  int index, next_index;  // of the panel

  // The rows of a strip. Returns which they are.
  HYBRID_INLINE Range run(int strip) const {
    const int row = strip * kStripRows, count = min(kStripRows, rows - row);
    Ahead ahead = fetch_from(strip, row, count);
    for_shapes(count, blocks, [&](auto tm, auto tn, Range some) __attribute__((always_inline)) {
      strip_passes<Format, tm.value, tn.value>(panel, strips.at(index, strip), row, some, ahead);
    });
    return {row, row + count};
  }

 private:
  HYBRID_INLINE int share_of(int rows_before) const {  // of the lines to be fetched
    constexpr int four = BlocksAhead::kStreams;
    return int(int64_t(next.lines) * ((blocks + four - 1) / four) * rows_before / rows);
  }
  HYBRID_INLINE Ahead fetch_from(int strip, int row, int count) const {
    const int tiles = (panel.last - panel.operands.first) * Format::steps / kTileLines;
    const int steps = tiles * blocks / (count > kTileRows ? 2 : 4);  // of products, about
    const int fetched = share_of(row), lines = share_of(row + count) - fetched;
    const bool same = row + count < rows;
    const Strip<Format>& after = same ? strips.at(index, strip + 1) : strips.at(next_index, 0);
    const int strip_lines = rows > kFewRows ? int(sizeof(Strip<Format>) / kLine) : 0;
    return {BlocksAhead::from(next.at, next.stride, next.lines, fetched, lines, (lines + steps) / (steps + 1)),
            {reinterpret_cast<const char*>(&after), strip_lines, (strip_lines + steps) / (steps + 1)}};
  }
};

template <class Format>
static HYBRID_KERNEL Range run_strip(const BandPasses<Format>& passes, int strip) {
  return passes.run(strip);
}

// A band of rows over up to kGroupBlocks blocks, panel by panel. behind: blocks that come next. Sums of a strip are
// finished while they are near.
template <class Group, class Format, class Epilogue>
static HYBRID_INLINE void group_passes(const Group& group, const Strips<Format>& strips, Range band, int blocks,
                                       int behind, float* sums, Epilogue epilogue) {
  constexpr int width = kTilePanelInputs<Format>;
  const Blocks<Format>& w = group.multiplied();
  const int rows = band.last - band.first;
  const int64_t stride = int64_t(whole_tiles(rows)) * kBlock;
  for (int first = 0, index = 0; first < w.inputs; first += width, ++index) {
    const int last = min(w.inputs, first + width);
    const bool more = last < w.inputs;
    Stored next = group.stored(more ? 0 : blocks, more ? last : 0, min(w.inputs, more ? last + width : width));
    const Lines operands = group.operands(blocks, first, last, next);
    if (Group::fetches || !(more || behind)) next.lines = 0;
    const TilePanel<Format> panel{w, operands, last / Format::line_inputs, sums, stride};
    const BandPasses<Format> passes{panel, strips, rows, blocks, next, index, more ? index + 1 : 0};
    for (int strip = 0; strip < strips.count; ++strip) {
      const Range found = run_strip(passes, strip);
      if (!more)
        epilogue(Sums{sums + found.first * kBlock, kBlock, stride}, {band.first + found.first, band.first + found.last},
                 blocks);
    }
  }
}

// A band of rows over all blocks, group by group.
template <class Group, class Format, class Epilogue>
static HYBRID_INLINE void band_groups(const Format& format, const Strips<typename Group::Multiplied>& strips,
                                      Range band, const char* matrix, int inputs, Range blocks, float* sums,
                                      char* opened, Epilogue epilogue) {
  const int width = band.last - band.first > kFewRows ? kGroupBlocks : kGroupBlocks / 2;
  for (int block = blocks.first; block < blocks.last; block += width) {
    const int some = min(width, blocks.last - block);
    const Group group(format, matrix, inputs, block, opened);
    if (block == blocks.first)
      group.stored(0, 0, min(inputs, kTilePanelInputs<typename Group::Multiplied>)).fetch(some);
    const auto finish = [&](const Sums& found, Range rows, int count)
                            __attribute__((always_inline)) { epilogue(found, rows, block, count); };
    group_passes(group, strips, band, some, blocks.last - block - some, sums, finish);
  }
}

// All rows, band by band; what was copied of them for other blocks serves again if it is all of them.
template <class Group, class Format, class Epilogue>
static HYBRID_INLINE void tile_bands(const Format& format, Copied& copied, const Rows& rows, int count,
                                     const char* matrix, int inputs, Range blocks, char* scratch, Epilogue epilogue) {
  using Multiplied = typename Group::Multiplied;
  char* const opened = scratch + sums_bytes(whole_tiles(min(count, kBandRows)), kGroupBlocks);
  char* const copies = opened + (Multiplied::opened ? 0 : kGroupBlocks * kPanelBytes);
  const bool known = count <= kBandRows && copied.are(rows, count);
  for (int row = 0; row < count; row += kBandRows) {
    const Range band{row, min(count, row + kBandRows)};
    const Strips<Multiplied> strips{reinterpret_cast<Strip<Multiplied>*>(copies),
                                    (band.last - band.first + kStripRows - 1) / kStripRows};
    if (!known) fill_strips(strips, rows, band, inputs);
    band_groups<Group>(format, strips, band, matrix, inputs, blocks, reinterpret_cast<float*>(scratch), opened,
                       epilogue);
  }
  copied = {rows.base, rows.index, count};
}

// As product().
template <class Format, class Epilogue>
static HYBRID_INLINE void tile_product(const Format& format, Copied& copied, const Rows& left, int rows,
                                       const char* matrix, int inputs, Range blocks, char* scratch, Epilogue epilogue) {
  tile_bands<typename TileGroup<Format>::Type>(format, copied, left, rows, matrix, inputs, blocks, scratch, epilogue);
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
