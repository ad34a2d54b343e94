// Products of many rows on matrix tiles: 32 rows by two blocks at a time, or 16 rows by up to four.
//
// Sums of a segment are those of the other kernels: integers exactly, so that these formats give the same bits.
#pragma once

#include "ops/grouped_product.h"
#include "ops/probe.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kLeft = 4, kRight = 6;  // the first tiles of the operands
constexpr int kParts = 4;             // segments that wait to be merged: sums are loaded and stored once for all

// int4 as it is multiplied: signed bytes, which leave no offset to be taken back from every segment.
struct SignedInt4 : Int4 {
  static constexpr bool has_signs = true;
  static HYBRID_INLINE void open(const char* line, int step, Scale, char* out) {
    Isa::store_signed_nibbles(out, line, step);
  }
  static HYBRID_INLINE Sum start(const char*, int, int) { return Isa::set_int(0); }
};

// mxfp4 as bf16 pairs, scaled, which is exact.
struct TiledMxfp4 : Mxfp4 {
  using Scale = Isa::Fp4::Scale;
  static constexpr int scale_lines = layout.group / line_inputs;  // that one scale of every column is for
  static constexpr int scaled_lines = layout.part_inputs() / line_inputs;

  static constexpr int header(int inputs) { return layout.scales_bytes(inputs); }
  static HYBRID_INLINE Scale scale(const char* block, int line) {
    const char* const part = block + int64_t(line / scaled_lines) * layout.part_bytes();
    return Isa::Fp4::scale(part + line / scale_lines % 4 * kBlock);
  }
  static HYBRID_INLINE void open(const char* line, int step, Scale scale, char* out) {
    Isa::store_line(out, Isa::Fp4::open(line, step, scale));
  }
};

// What tiles multiply of a stored format.
template <class Format>
struct TiledAs {
  using Type = Format;
};
template <>
struct TiledAs<Int4> {
  using Type = SignedInt4;
};
template <>
struct TiledAs<Mxfp4> {
  using Type = TiledMxfp4;
};
template <class Format>
using Tiled = typename TiledAs<Format>::Type;

// Lines of one tile product. A segment of int4 is 8: half a tile, and half the speed.
template <class Format>
constexpr int kTileLines =
    Format::segment && Format::segment * Format::steps < 16 ? Format::segment * Format::steps : 16;

template <class Format>
static void load_tiles(const Format& format) {
  if constexpr (Format::grouped)
    Isa::load_tiles(format.layout.group() / 4);
  else
    Isa::load_tiles(kTileLines<Format>);
}

template <class Format>
static void release_tiles() {
  Isa::release_tiles();
}

// function(Int<0>), ... function(Int<N - 1>): the numbers of tiles are part of the instructions.
template <int N, class Function>
static HYBRID_INLINE void repeat(Function function) {
  if constexpr (N > 1) repeat<N - 1>(function);
  function(Int<N - 1>{});
}

// 16 rows of the left operand.
struct TileRows {
  const char* data;
  int64_t stride;
};

// The left operand by 16 rows. Rows that do not lie at equal distances, and those of a last tile that they do not
// fill, are copied.
class LeftTiles {
 public:
  template <class RowAt>
  HYBRID_INLINE LeftTiles(RowAt row_at, int rows, int bytes, char* copies)
      : data_(row_at(0)), stride_(rows > 1 ? row_at(1) - data_ : 0), copies_(copies), copy_stride_(copy_stride(bytes)) {
    int even = 1;
    while (even < rows && row_at(even) == data_ + even * stride_) ++even;
    in_place_ = even / kTileRows * kTileRows;
    int row = in_place_;
    for (; row < rows; ++row, copies += copy_stride_) __builtin_memcpy(copies, row_at(row), size_t(bytes));
    for (; row % kTileRows; ++row, copies += copy_stride_) __builtin_memset(copies, 0, size_t(bytes));
  }
  HYBRID_INLINE TileRows at(int row) const {
    if (row < in_place_) return {data_ + row * stride_, stride_};
    return {copies_ + (row - in_place_) * copy_stride_, copy_stride_};
  }

 private:
  const char* data_;
  int64_t stride_;
  const char* copies_;
  int64_t copy_stride_;
  int in_place_;
};

// Of every tile product's lines, those laid out alike at `next` of which one pass fetches its share.
struct Fetch {
  const char* next;
  int first, last;
};

static HYBRID_INLINE Fetch share_fetch(const char* next, int pass, int passes) {
  return {next, kTileRows * pass / passes, kTileRows * (pass + 1) / passes};
}

template <class Format, int sums, int left, int right>
static HYBRID_INLINE void multiply_tile() {
  if constexpr (!Format::integer)
    Isa::multiply_bf16<sums, left, right>();
  else if constexpr (Format::has_signs)
    Isa::multiply_signed<sums, left, right>();
  else
    Isa::multiply_unsigned<sums, left, right>();
}

// Sums of TM times 16 rows and TN blocks += their rows from byte `skip` on times `steps` tiles of lines of every block.
template <class Format, int TN, int TM>
static HYBRID_INLINE void multiply_tiles(const TileRows (&left)[TM], int64_t skip, const Lines& w, int steps,
                                         const Fetch& fetch) {
  constexpr int lines = kTileLines<Format>;
  const char *line = w.data, *next = fetch.next;
  for (int step = 0; step < steps; ++step, skip += 4 * lines) {
    repeat<TM>([&](auto i) __attribute__((always_inline)) {
      Isa::load_tile<kLeft + i.value>(left[i.value].data + skip, left[i.value].stride);
    });
    repeat<TN>([&](auto j) __attribute__((always_inline)) {
      Isa::load_tile<kRight + j.value % 2>(line + j.value * w.block_stride, w.line_stride);
      for (int k = fetch.first; k < fetch.last; ++k)
        __builtin_prefetch(next + j.value * w.block_stride + k * w.line_stride, 0, 2);
      repeat<TM>([&](auto i) __attribute__((always_inline)) {
        multiply_tile<Format, i.value * TN + j.value, kLeft + i.value, kRight + j.value % 2>();
      });
    });
    line += lines * w.line_stride;
    next += lines * w.line_stride;
  }
}

template <int TM, int TN>
static HYBRID_INLINE void clear_tiles() {
  repeat<TM * TN>([](auto c) __attribute__((always_inline)) { Isa::clear_tile<c.value>(); });
}

// Sums [TM * 16][stride] bytes, TN blocks in a row.
template <int TM, int TN>
static HYBRID_INLINE void load_tile_sums(const char* from, int64_t stride) {
  repeat<TM * TN>([&](auto c) __attribute__((always_inline)) {
    Isa::load_tile<c.value>(from + c.value / TN * kTileRows * stride + c.value % TN * kLine, stride);
  });
}

template <int TM, int TN>
static HYBRID_INLINE void store_tile_sums(char* to, int64_t stride) {
  repeat<TM * TN>([&](auto c) __attribute__((always_inline)) {
    Isa::store_tile<c.value>(to + c.value / TN * kTileRows * stride + c.value % TN * kLine, stride);
  });
}

// A product of many rows while it is made, and the panel at hand: stored lines [first, last).
template <class Format>
struct TileProduct {
  const Rows& rows;
  int count;
  const LeftTiles& left;
  const Blocks<Format>& w;
  int width;  // blocks that are multiplied together
  float* sums;
  Lines operands;
  int last;
  const char* next;

  HYBRID_INLINE float* sums_of(int row, int j) const { return sums + (int64_t(row) * width + j) * kBlock; }
};

// Segments of one panel before they are merged: int32 or fp32 sums [TM * 16][TN][16] of each; and of integers the sums
// of those merged before, which wait for the scale of the rows.
template <int TM, int TN>
struct Parts {
  alignas(64) int32_t sums[kParts][TM * kTileRows][TN][kBlock];
  float scaled[TM * kTileRows][TN][kBlock];
};

template <class Format, class Sum>
static HYBRID_INLINE F32 widened(const int32_t* part, Sum start) {
  if constexpr (Format::integer)
    return Format::widen(Isa::load_int(part) + start);
  else
    return Isa::load(reinterpret_cast<const float*>(part));
}

// Adds `count` segments, the first from stored line `line` on, to the sums of up to TM * 16 rows from `row` on and of
// TN blocks from `first` on: the operations of accumulate() in ops/product.h in their order.
template <class Format, int TM, int TN>
static HYBRID_INLINE void merge_parts(const TileProduct<Format>& p, int row, int first, int line, int count,
                                      Parts<TM, TN>& parts) {
  constexpr bool waits = Format::integer && !Format::opened_groups;  // for the scale of the rows
  const char* const header = p.w.header + first * p.w.stride;
  F32 scale[TN][kParts], minimum[TN][kParts], row_scale[kParts], row_sum[kParts];
  for (int s = 0; s < count; ++s) {
    for (int j = 0; j < TN; ++j) {
      scale[j][s] = Format::group_scale(header + j * p.w.stride, line + s * Format::segment);
      if constexpr (Format::opened_groups)
        minimum[j][s] = Format::group_minimum(header + j * p.w.stride, line + s * Format::segment);
    }
  }
  const int rows = min(TM * kTileRows, p.count - row), input = line * Format::line_inputs;
  const bool begins = line == p.operands.first, ends = line + count * Format::segment >= p.last;
  for (int r = 0; r < rows; ++r) {
    const char* const values = p.rows.at(row + r);
    const auto start = Format::start(values, p.w.inputs, input);  // where it is not zero there is one segment
    if constexpr (Format::opened_groups) {
      for (int s = 0; s < count; ++s) {
        const RowGroup group = Format::row_group(values, p.w.inputs, line + s * Format::segment);
        row_scale[s] = Isa::set(group.scale);
        row_sum[s] = Isa::set(group.sum);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < TN; ++j) {
      float *const at = p.sums_of(row + r, first + j), *const scaled = parts.scaled[r][j];
      const F32 before = p.operands.first || !(waits || begins) ? Isa::load(at) : Isa::zero();
      F32 sum = !waits ? before : begins ? Isa::zero() : Isa::load(scaled);
      for (int s = 0; s < count; ++s) {
        const F32 part = widened<Format>(parts.sums[s][r][j], start);
        if constexpr (Format::opened_groups)
          sum = Format::merge(sum, part, {scale[j][s], minimum[j][s]}, row_scale[s], row_sum[s]);
        else
          sum = Isa::fma(part, scale[j][s], sum);
      }
      if (!ends) {
        Isa::store(waits ? scaled : at, sum);
        continue;
      }
      if constexpr (waits) sum = Isa::fma(sum, Isa::set(Format::row_scale(values, p.w.inputs, input)), before);
      Isa::store(at, p.last == p.w.lines ? Format::finish(sum, header + j * p.w.stride) : sum);
    }
  }
}

// Up to TM * 16 rows from `row` on and TN blocks from `first` on over the panel.
template <class Format, int TM, int TN>
static HYBRID_KERNEL void tile_pass(const TileProduct<Format>& p, int row, int first, Fetch fetch) {
  static_assert(kPanelInputs == kScaleInputs, "rows of a panel have one scale");
  constexpr int step_lines = kTileLines<Format> / Format::steps;  // stored lines of a tile product
  TileRows left[TM];
  for (int i = 0; i < TM; ++i) left[i] = p.left.at(row + i * kTileRows);
  Lines w = p.operands;
  w.data += first * w.block_stride;
  fetch.next += first * w.block_stride;
  const auto run = [&](int line, int end) __attribute__((always_inline)) {
    const int steps = (end - line) / step_lines;
    multiply_tiles<Format, TN>(left, 4 * Format::steps * int64_t(line), w, steps, fetch);
    w.data += steps * kTileLines<Format> * w.line_stride;
    fetch.next += steps * kTileLines<Format> * w.line_stride;
  };
  if constexpr (Format::chained) {
    char* const sums = reinterpret_cast<char*>(p.sums_of(row, first));
    if (w.first)
      load_tile_sums<TM, TN>(sums, p.width * kLine);
    else
      clear_tiles<TM, TN>();
    run(w.first, p.last);
    store_tile_sums<TM, TN>(sums, p.width * kLine);
  } else {
    Parts<TM, TN> parts;
    for (int line = w.first; line < p.last;) {
      const int begin = line;
      int count = 0;
      for (; count < kParts && line < p.last; ++count) {
        const int end = segment_end<Format>(line, p.last);
        clear_tiles<TM, TN>();
        run(line, end);
        store_tile_sums<TM, TN>(reinterpret_cast<char*>(parts.sums[count]), TN * kLine);
        line = end;
      }
      merge_parts(p, row, first, begin, count, parts);
    }
  }
}

// Calls function(Int<TM>, Int<TN>, row, first block, pass) for all rows and NB blocks; `pass` counts the tiles of rows.
template <int NB, class Function>
static HYBRID_INLINE void for_tiles(int rows, Function function) {
  constexpr int two = NB < 2 ? NB : 2;
  for (int row = 0, pass = 0; row < rows; row += 2 * kTileRows, ++pass) {
    if (rows - row <= kTileRows) {
      function(Int<1>{}, Int<NB>{}, row, 0, pass);
    } else {
      for (int j = 0; j < NB; j += two) function(Int<2>{}, Int<two>{}, row, j, pass);
    }
  }
}

static HYBRID_INLINE int tile_passes(int rows) { return (rows + 2 * kTileRows - 1) / (2 * kTileRows); }

// All rows over NB blocks and one panel; `some`: what the first pass of several fetches meanwhile, if any.
template <class Format, int NB>
static HYBRID_INLINE void tile_panel(const TileProduct<Format>& p, const char* opened) {
  for_tiles<NB>(p.count, [&](auto tm, auto tn, int row, int j, int pass) __attribute__((always_inline)) {
    const Fetch none{opened, 0, 0}, some = share_fetch(p.next, pass, tile_passes(p.count));
    tile_pass<Format, tm.value, tn.value>(p, row, j, Format::opened ? some : none);
  });
}

// All rows over NB blocks, panel by panel.
template <class Format, int NB>
static HYBRID_KERNEL void tile_panels(const Rows& rows, int count, const LeftTiles& left, const Blocks<Format>& w,
                                      float* sums, char* opened) {
  constexpr int lines = kPanelInputs / Format::line_inputs;
  for (int first = 0; first < w.lines; first += lines) {
    const int last = min(w.lines, first + lines);
    const char* next = last == w.lines ? w.line(0) + NB * w.stride : w.line(last);
    if constexpr (!Format::opened) open_panel<Format, NB>(w, first, last, next, opened);
    TileProduct<Format> p{rows, count, left, w, NB, sums, w.from(first), last, next};
    if (!Format::opened) p.operands = {opened, kPanelBytes, kLine, nullptr, first};
    tile_panel<Format, NB>(p, opened);
  }
}

// The same of codes in groups.
template <int group, int NB>
static HYBRID_KERNEL void tile_group_panels(const Rows& rows, int count, const LeftTiles& left, const GroupBlocks& w,
                                            float* sums, char* opened) {
  const auto opened_w = opened_blocks<group>(opened, w.inputs);
  for (int first = 0; first < w.inputs; first += kPanelInputs) {
    const int last = min(w.inputs, first + kPanelInputs);
    with_bits(w.layout.bits, [&](auto bits) { open_groups<bits.value>(w, NB, first, last, opened); });
    const Lines operands{opened, kPanelBytes, kLine, nullptr, first / 4};
    tile_panel<OpenedGroups<group>, NB>({rows, count, left, opened_w, NB, sums, operands, last / 4, opened}, opened);
  }
}

// As product(). Scratch: sums of whole tiles of rows, opened panels, and copies of rows.
template <class Stored, class Epilogue>
static HYBRID_INLINE void tile_product(const Stored& format, const Rows& left, int rows, const char* matrix, int inputs,
                                       Range blocks, char* scratch, Epilogue epilogue) {
  float* const sums = reinterpret_cast<float*>(scratch);
  char* const opened = scratch + sums_bytes(whole_tiles(rows), Isa::max_blocks);
  char* const copies = opened + (Stored::opened ? 0 : Isa::max_blocks * kPanelBytes);
  const auto row_at = [&](int row) { return left.at(row); };
  const LeftTiles tiles(row_at, rows, inputs / Stored::step_inputs * 4, copies);
  for_block_groups(blocks, [&](auto nb, int block) __attribute__((always_inline)) {
    if constexpr (Stored::grouped) {
      const GroupBlocks w(format.layout, matrix, inputs, block);
      if (w.layout.group() == 16)
        tile_group_panels<16, nb.value>(left, rows, tiles, w, sums, opened);
      else
        tile_group_panels<32, nb.value>(left, rows, tiles, w, sums, opened);
    } else {
      const Blocks<Tiled<Stored>> w(matrix, inputs, block);
      tile_panels<Tiled<Stored>, nb.value>(left, rows, tiles, w, sums, opened);
    }
    epilogue(sums, rows, block, nb.value);
  });
}

// What multiply() of ops/probe.h measures, on tiles.
template <class Format>
static double multiply_in_tiles(int64_t rounds) {
  alignas(64) char rows[2][kTileRows][kLine] = {}, lines[2][kTileRows][kLine] = {}, sums[4][kTileRows][kLine];
  const TileRows left[2] = {{rows[0][0], kLine}, {rows[1][0], kLine}};
  const Lines w{lines[0][0], kTileRows * kLine, kLine, nullptr, 0};
  load_tiles(Format{});
  clear_tiles<2, 2>();
  for (int64_t i = 0; i < rounds; ++i) multiply_tiles<Format, 2>(left, 0, w, 1, Fetch{w.data, 0, 0});
  store_tile_sums<2, 2>(sums[0][0], 2 * kLine);
  release_tiles<Format>();
  return double(rounds) * 2.0 * Format::step_inputs * kTileLines<Format> * 4 * kTileRows * kBlock;
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
