// The one matrix product: rows of activations times packed blocks of 16 columns, in every format.
//
// Every output element is one chain of operations over the inputs in ascending order, whatever the number of rows: the
// segments of a format (inputs that share scales) are the same whether few rows stream past or many pass over a panel.
#pragma once

#include "ops/segments.h"
#include "ops/tile_use.h"

namespace hybrid {
namespace HYBRID_ISA {

// Asks for the share of lines [first, last) in the headers of the blocks that follow, where scales are there.
template <int NB, class Format>
static HYBRID_INLINE void fetch_header(const Blocks<Format>& w, int first, int last) {
  if constexpr (Format::scaled_lines > 0) return;
  const char* next = w.header + NB * w.stride;
  const int64_t begin = int64_t(w.header_bytes) * first / w.lines, end = int64_t(w.header_bytes) * last / w.lines;
  for (int64_t i = begin; i < end; i += kLine)
    for (int j = 0; j < NB; ++j) __builtin_prefetch(next + j * w.stride + i, 0, 2);
}

// Asks for the scales that lie before stored line `line` of some blocks, which is at `at`, if any do.
template <int NB, int level = Far::level, class Format>
static HYBRID_INLINE void fetch_scales(const Blocks<Format>& w, int line, const char* at) {
  if constexpr (Format::scaled_lines > 0) {
    if (line % Format::scaled_lines) return;
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) __builtin_prefetch(at - kLine + j * w.stride, 0, level);
  }
}

// The same of one block, of bytes that lie `ahead` of it, before any line of it is multiplied.
template <class Ahead, class Format>
static HYBRID_INLINE void fetch_ordered_header(const Blocks<Format>& w) {
  if constexpr (Format::scaled_lines > 0) return;
  for (int i = 0; i < w.header_bytes; i += kLine) __builtin_prefetch(w.header + Ahead::ahead + i, 0, Ahead::level);
}

// A single tile of rows: lines stream past once, in order, fetched some way ahead. The stream runs on into the group
// of blocks that follows, so the last lines fetch that group's first; of one block what is fetched lies `ahead` of what
// is multiplied. out: sums [MR][NB][16], rows `stride` floats apart.
template <class Format, class Ahead, int MR, int NB>
static HYBRID_KERNEL void stream(const char* const* rows, const Blocks<Format>& w, float* out, int stride) {
  static_assert(NB == 1 || !Ahead::ordered);
  const int lead = min(Ahead::ahead / kLine, w.lines), main = Ahead::ordered ? 0 : w.lines - lead;
  F32 sums[MR][NB];
  load_sums(sums, nullptr);
  constexpr int panel = kPanelInputs / Format::line_inputs;
  if constexpr (Ahead::ordered) fetch_ordered_header<Ahead>(w);
  const auto run = [&](auto& acc, int first, int end) __attribute__((always_inline)) {
    for (int line = first; line < end;) {
      const int last = line < main ? min(end, main) : end;
      const char* next = Ahead::ordered ? w.line(line) + Ahead::ahead
                         : line < main  ? w.line(line + lead)
                                        : w.line(line - main) + NB * w.stride;
      const char* a[MR];
      advance<Format>(a, rows, line);
      fetch_scales<NB, Ahead::level>(w, line, next);
      multiply<Format, NB, Ahead::level>(acc, a, w.from(line), last - line, next);
      line = last;
    }
  };
  for (int first = 0; first < w.lines; first += panel) {
    const int last = min(w.lines, first + panel);
    if constexpr (!Ahead::ordered) fetch_header<NB>(w, first, last);
    accumulate<Format>(sums, rows, w, first, last, run);
  }
  finish<Format>(sums, w);
  store_sums(out, sums, stride);
}

// A single tile over some blocks. out: sums [MR][NB][16].
template <class Format, int MR, int NB>
static HYBRID_INLINE void stream_blocks(const char* const* rows, const Blocks<Format>& w, float* out) {
  constexpr int abreast = Format::streamed && MR > kAbreastRows ? kAlone : Format::abreast;
  for_streams<Format::ordered.near, Format::ordered.far, MR, NB, abreast>(
      [&](auto ahead, auto together, int j) __attribute__((always_inline)) {
        stream<Format, decltype(ahead), MR, together.value>(rows, w.behind(j), out + j * kBlock, NB * kBlock);
      });
}

// Stored lines [first, last) of NB blocks as operands, `kPanelBytes` a block; meanwhile those at `next` are fetched.
// Done once for all rows that pass over the panel.
template <class Format, int NB>
static HYBRID_KERNEL void open_panel(const Blocks<Format>& w, int first, int last, const char* next, char* out) {
  for (int i = 0; i < last - first;) {
    typename Format::Scale scale[NB];
    for (int j = 0; j < NB; ++j) scale[j] = Format::scale(w.header + j * w.stride, first + i);
    fetch_scales<NB>(w, first + i, next + lines_bytes<Format>(i));
    for (const int end = i + Format::scale_lines; i < end; ++i) {
      for (int j = 0; j < NB; ++j) {
        __builtin_prefetch(next + j * w.stride + lines_bytes<Format>(i), 0, 2);
        const char* line = w.line(first + i) + j * w.stride;
        Format::open(line, scale[j], out + j * kPanelBytes + i * Format::steps * kLine);
      }
    }
  }
}

// A panel: stored lines [first, last) of some blocks as operands, and which tile of how many passes over it.
struct Panel {
  Lines operands;
  int last;
  int tile, tiles;
  const char* next;  // the panel to fetch meanwhile, where the stored lines are operands themselves
};

// One tile over one panel, added to the sums [MR][NB][16].
template <class Format, int MR, int NB>
static HYBRID_KERNEL void pass(const char* const* rows, const Blocks<Format>& w, const Panel& panel, float* saved) {
  using Plain = typename Either<Format::integer, OpenedBytes<Format::joined_steps>, Bf16>::Type;
  using Operands = typename Either<Format::opened, Format, Plain>::Type;
  F32 sums[MR][NB];
  load_sums(sums, panel.operands.first > 0 ? saved : nullptr);
  const int first = panel.operands.first;
  const auto run = [&](auto& acc, int line, int end) __attribute__((always_inline)) {
    const int64_t done = (line - first) * Format::steps * kLine;
    Lines lines = panel.operands;
    lines.data += done;
    const char* a[MR];
    advance<Format>(a, rows, line);
    if constexpr (Format::opened)
      multiply_shared<Operands>(acc, a, lines, end - line, panel.tile, panel.tiles, panel.next + done);
    else
      multiply<Operands, 0>(acc, a, lines, (end - line) * Format::steps, lines.data);
  };
  accumulate<Format>(sums, rows, w, first, panel.last, run);
  if (panel.last == w.lines) finish<Format>(sums, w);
  store_sums(saved, sums);
}

// All rows over one panel of blocks whose sums fit the registers, tile by tile. sums: [rows][NB][16].
template <class Format, int NB>
static HYBRID_INLINE void pass_rows(const Rows& left, int rows, const Blocks<Format>& w, Panel& panel, float* sums) {
  for_row_tiles(rows, [&](auto mr, int row, int tile) __attribute__((always_inline)) {
    constexpr int MR = decltype(mr)::value;
    const char* at[MR];
    for (int r = 0; r < MR; ++r) at[r] = left.at(row + r);
    panel.tile = tile;
    pass<Format, MR, NB>(at, w, panel, sums + row * NB * kBlock);
  });
}

// The same of NB blocks, some after the others. sums: [NB / some][rows][some][16].
template <class Format, int NB>
static HYBRID_INLINE void pass_blocks(const Rows& left, int rows, const Blocks<Format>& w, Panel panel, float* sums) {
  constexpr int some = min(NB, Format::panel_blocks);
  for (int j = 0; j < NB; j += some) {
    pass_rows<Format, some>(left, rows, w.behind(j), panel, sums + sums_bytes(rows, j) / sizeof(float));
    panel.operands.data += some * panel.operands.block_stride;
  }
}

// What it made of `rows` rows.
template <class Format, int NB>
static HYBRID_INLINE Sums panel_sums(const float* sums, int rows) {
  constexpr int some = min(NB, Format::panel_blocks);
  static_assert(some == 1 || some == NB);
  return {sums, some * kBlock, some == NB ? kBlock : rows * int64_t(kBlock)};
}

// Many rows: panel by panel, all tiles over each; unfinished sums wait in `scratch`, before the opened panel.
template <class Format, int NB, class Epilogue>
static HYBRID_INLINE void panels(const Rows& left, int rows, const Blocks<Format>& w, int block, char* scratch,
                                 Epilogue epilogue) {
  constexpr int lines = kPanelInputs / Format::line_inputs;
  float* const sums = reinterpret_cast<float*>(scratch);
  char* const opened = scratch + sums_bytes(rows, NB);
  for (int first = 0; first < w.lines; first += lines) {
    const int last = min(w.lines, first + lines);
    const char* next = last == w.lines ? w.line(0) + NB * w.stride : w.line(last);
    if constexpr (!Format::opened) open_panel<Format, NB>(w, first, last, next, opened);
    Panel panel{w.from(first), last, 0, tile_count(rows), next};
    if (!Format::opened) panel.operands = {opened, kPanelBytes, kLine, nullptr, first};
    pass_blocks<Format, NB>(left, rows, w, panel, sums);
  }
  epilogue(panel_sums<Format, NB>(sums, rows), Range{0, rows}, block, NB);
}

// Defined in ops/grouped_product.h.
template <class Epilogue>
static void group_product(const Grouped& format, const Rows& left, int rows, const char* matrix, int inputs,
                          Range blocks, char* scratch, Epilogue epilogue);

// Defined in ops/fp4_product.h.
template <class Format, class Epilogue>
static void fp4_product(const Rows& left, int rows, const char* matrix, int inputs, Range blocks, char* scratch,
                        Epilogue epilogue);

// product[r, c] for rows [0, rows) and the given blocks of the matrix of `inputs` inputs. Finished sums go to
// epilogue(sums, some_rows, block, count): those of `count` blocks from `block` on, from row some_rows.first on.
// scratch: see product_bytes() in executor/scratch.h.
template <class Format, class Epilogue>
static HYBRID_INLINE void product(const Tiles<Format>& tiles, const Rows& left, int rows, const char* matrix,
                                  int inputs, Range blocks, char* scratch, Epilogue epilogue) {
  if constexpr (Isa::has_tiles && Format::tiled) {
    if (tiles.multiply(rows))
      return tile_product(tiles.format, tiles.copied, left, rows, matrix, inputs, blocks, scratch, epilogue);
  }
  if constexpr (Format::grouped) {
    group_product(tiles.format, left, rows, matrix, inputs, blocks, scratch, epilogue);
  } else if constexpr (Format::wide) {
    fp4_product<Format>(left, rows, matrix, inputs, blocks, scratch, epilogue);
  } else {
    for_block_groups(blocks, [&](auto nb, int block) __attribute__((always_inline)) {
      constexpr int NB = decltype(nb)::value;
      const Blocks<Format> w(matrix, inputs, block);
      if constexpr (!Format::streamed) {
        if (rows > Isa::max_rows) return panels<Format, NB>(left, rows, w, block, scratch, epilogue);
      }
      float* const sums = reinterpret_cast<float*>(scratch);
      for_row_tiles<Format::streamed ? Isa::group_rows : Isa::max_rows>(
          rows, [&](auto mr, int row, int) __attribute__((always_inline)) {
            const char* at[mr.value];
            for (int r = 0; r < mr.value; ++r) at[r] = left.at(row + r);
            stream_blocks<Format, mr.value, NB>(at, w, sums + row * NB * kBlock);
          });
      epilogue(Sums{sums, NB * kBlock, kBlock}, Range{0, rows}, block, NB);
    });
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
