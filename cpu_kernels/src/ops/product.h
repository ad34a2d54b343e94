// The one matrix product: rows of activations times packed blocks of 16 columns, in every format.
//
// Every output element is one chain of operations over the inputs in ascending order, whatever the number of rows: the
// segments of a format (inputs that share scales) are the same whether few rows stream past or many pass over a panel.
#pragma once

#include "ops/reading.h"
#include "ops/tile_use.h"

namespace hybrid {
namespace HYBRID_ISA {

// acc[r][j] += rows a[r] times block j, over `count` stored lines. Beside every line, `fetch` lines laid out as the
// blocks are, from `next` on, are asked for: what comes next is read from memory while this is multiplied.
template <class Format, int fetch, int level = Far::level, int MR, int NB>
static HYBRID_INLINE void multiply(typename Format::Part (&acc)[MR][NB], const char* const (&a)[MR], const Lines& w,
                                   int count, const char* next) {
  const char* line = w.data;
  for (int i = 0; i < count;) {
    typename Format::Scale scale[NB];
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) scale[j] = Format::scale(w.header + j * w.block_stride, w.first + i);
    for (const int end = i + Format::scale_lines; i < end; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < fetch; ++j) __builtin_prefetch(next + j * w.block_stride, 0, level);
#pragma GCC unroll 4
      for (int step = 0; step < Format::steps; ++step) {
        typename Format::Line operand[NB];
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) operand[j] = Format::operand(line + j * w.block_stride, step, scale[j]);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          const auto value = Format::value(a[r] + 4 * (Format::steps * i + step));
#pragma GCC unroll 8
          for (int j = 0; j < NB; ++j) acc[r][j] = Isa::dot(acc[r][j], operand[j], value);
        }
      }
      line += w.line_stride;
      next += w.line_stride;
    }
  }
}

// Of the `blocks` that come next as many are fetched by each of `tiles`, until all are.
static HYBRID_INLINE constexpr int fetched_blocks(int tiles, int blocks) {
  if (tiles == 1) return blocks;
  return tiles < blocks ? 2 : 1;
}

// The same for tile `tile` of `tiles` that pass over the same lines one after another: they share the fetching of the
// group of blocks at `next`, so that memory is asked at an even pace.
template <class Format, int MR, int NB>
static HYBRID_INLINE void multiply_shared(typename Format::Part (&acc)[MR][NB], const char* const (&a)[MR],
                                          const Lines& w, int count, int tile, int tiles, const char* next) {
  if (tiles == 1) return multiply<Format, NB>(acc, a, w, count, next);
  constexpr int two = NB < 2 ? NB : 2;
  const int each = fetched_blocks(tiles, NB);
  next += each * tile * w.block_stride;
  if (each * tile >= NB) return multiply<Format, 0>(acc, a, w, count, next);
  if (each == 1) return multiply<Format, 1>(acc, a, w, count, next);
  multiply<Format, two>(acc, a, w, count, next);
}

template <int MR, int NB>
static HYBRID_INLINE void load_sums(F32 (&sums)[MR][NB], const float* from) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) sums[r][j] = from ? Isa::load(from + (r * NB + j) * kBlock) : Isa::zero();
}

// stride: floats from a row to the next.
template <int MR, int NB>
static HYBRID_INLINE void store_sums(float* to, const F32 (&sums)[MR][NB], int stride = NB * kBlock) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) Isa::store(to + r * stride + j * kBlock, sums[r][j]);
}

// The part of a group of codes, scaled as its weights and as the rows are, and its minimum, added to the sums.
// scales_of(j): those of block j.
template <class Format, int MR, int NB, class ScalesOf>
static HYBRID_INLINE void merge_group(F32 (&sums)[MR][NB], const typename Format::Sum (&part)[MR][NB],
                                      const char* const* rows, int inputs, int line, ScalesOf scales_of) {
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j) {
    const OpenedScales w = scales_of(j);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const RowPart row = Format::row_part(rows[r], inputs, line);
      sums[r][j] = Format::merge(sums[r][j], Format::widen(part[r][j]), w, Isa::set(row.scale), Isa::set(row.sum));
    }
  }
}

template <class Format>
static HYBRID_INLINE int segment_end(int line, int last) {
  return Format::segment ? min(last, (line / Format::segment + 1) * Format::segment) : last;
}

// A segment's part, scaled as its group of weights is, added to the sums.
template <class Format, int MR, int NB>
static HYBRID_INLINE void merge(F32 (&sums)[MR][NB], const typename Format::Sum (&part)[MR][NB],
                                const char* const* rows, const Blocks<Format>& w, int line) {
  if constexpr (Format::opened_groups) {
    return merge_group<Format>(sums, part, rows, w.inputs, line, [&](int j) __attribute__((always_inline)) {
      const char* const header = w.header + j * w.stride;
      return OpenedScales{Format::group_scale(header, line), Format::group_minimum(header, line)};
    });
  }
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j) {
    const F32 scale = Format::group_scale(w.header + j * w.stride, line);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) sums[r][j] = Isa::fma(Format::widen(part[r][j]), scale, sums[r][j]);
  }
}

// Calls run(part, first, last) for stored lines [first, last) of a segment, as many at a time as `part` holds the sums
// of, and adds it to the exact sums. Segments of several parts are whole.
template <class Format, int MR, int NB, class Run>
static HYBRID_INLINE void add_parts(typename Format::Sum (&sums)[MR][NB], int first, int last, Run run) {
  if constexpr (Format::joined_steps == 0) {
    run(sums, first, last);
  } else {
    constexpr int lines = Format::joined_steps / Format::steps;
    constexpr int parts = Format::segment > lines ? Format::segment / lines : 1;
    static_assert(parts == 1 || parts * lines == Format::segment);
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i, first += lines) {
      typename Format::Part part[MR][NB];
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) part[r][j] = Isa::begin_small(sums[r][j]);
      run(part, first, parts == 1 ? last : first + lines);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) sums[r][j] = Isa::join(sums[r][j], part[r][j]);
    }
  }
}

// Stored lines [first, last), multiplied segment by segment by run(acc, first, last), each part added to the sums.
template <class Format, int MR, int NB, class Run>
static HYBRID_INLINE void add_segments(F32 (&sums)[MR][NB], const char* const* rows, const Blocks<Format>& w, int first,
                                       int last, Run run) {
  for (int line = first; line < last;) {
    const int end = segment_end<Format>(line, last);
    typename Format::Sum part[MR][NB];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const auto start = Format::start(rows[r], w.inputs, line * Format::line_inputs);
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) part[r][j] = start;
    }
    add_parts<Format>(part, line, end, run);
    merge<Format>(sums, part, rows, w, line);
    line = end;
  }
}

// The same of one panel, whatever the format. Rows of int8 have a scale a panel: it is applied once, behind the scales
// of the weights, because a multiplication more in every segment of int4 would halve its speed. Grouped rows have one a
// segment.
template <class Format, int MR, int NB, class Run>
static HYBRID_INLINE void accumulate(F32 (&sums)[MR][NB], const char* const* rows, const Blocks<Format>& w, int first,
                                     int last, Run run) {
  if constexpr (Format::chained) {
    run(sums, first, last);
  } else if constexpr (!Format::integer || Format::opened_groups) {
    add_segments<Format>(sums, rows, w, first, last, run);
  } else {
    F32 scaled[MR][NB];
    load_sums(scaled, nullptr);
    add_segments<Format>(scaled, rows, w, first, last, run);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const F32 scale = Isa::set(Format::row_scale(rows[r], w.inputs, first * Format::line_inputs));
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) sums[r][j] = Isa::fma(scaled[r][j], scale, sums[r][j]);
    }
  }
}

template <class Format, int MR, int NB>
static HYBRID_INLINE void finish(F32 (&sums)[MR][NB], const Blocks<Format>& w) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) sums[r][j] = Format::finish(sums[r][j], w.header + j * w.stride);
}

template <class Format, int MR>
static HYBRID_INLINE void advance(const char* (&a)[MR], const char* const* rows, int line) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) a[r] = rows[r] + 4 * Format::steps * line;
}

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
  for_streams<Format::ordered.near, Format::ordered.far, MR, NB, Format::abreast>(
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
      if (rows > Isa::max_rows) return panels<Format, NB>(left, rows, w, block, scratch, epilogue);
      const char* at[Isa::max_rows] = {};
      for (int r = 0; r < rows; ++r) at[r] = left.at(r);
      float* const sums = reinterpret_cast<float*>(scratch);
      with_rows<Isa::max_rows>(rows, [&](auto mr) __attribute__((always_inline)) {
        stream_blocks<Format, decltype(mr)::value, NB>(at, w, sums);
      });
      epilogue(Sums{sums, NB * kBlock, kBlock}, Range{0, rows}, block, NB);
    });
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
