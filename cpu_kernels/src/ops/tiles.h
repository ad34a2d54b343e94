// Matrix tiles: what they multiply of a format, and products of 32 rows by two blocks, or of 16 rows by up to four.
#pragma once

#include "ops/grouped_product.h"
#include "ops/probe.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kLeft = 4, kRight = 6;  // the first tiles of the operands

// int4 as it is multiplied: signed bytes of a panel, and for each column and 256 inputs a scale, rounded as int8 is. So
// a whole tile is multiplied, not half of one, and sums are merged once for 256 inputs instead of 32.
struct ScaledInt4 : IntegerKind<0, kScaleInputs, Isa::small_steps(8)> {
  static constexpr int line_inputs = 4;
  static constexpr int steps = 1;
  static constexpr bool chained = false;
  static constexpr bool has_signs = true;
  static constexpr int segment = kScaleInputs / line_inputs;
  static constexpr bool opened = false;
  static constexpr int panel_scales = 2;

  static constexpr int header(int) { return panel_scales * kLine; }
  static HYBRID_INLINE F32 group_scale(const char* scales, int line) {
    return Isa::load(reinterpret_cast<const float*>(scales) + line / segment % panel_scales * kBlock);
  }
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
  static HYBRID_INLINE void open(const char* line, Scale scale, char* out) {
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) Isa::store_line(out + step * kLine, Isa::Fp4::open(line, step, scale));
  }
};

// Codes in groups as bf16 pairs, scaled and with their minima. As bytes what shares a scale would fill half a tile or a
// quarter, and its sums would be merged after every product.
struct TiledGroups : Bf16 {
  static constexpr bool opened = false;
};

// What tiles multiply of a stored format.
template <class Format>
struct TiledAs {
  using Type = Format;
};
template <>
struct TiledAs<Int4> {
  using Type = ScaledInt4;
};
template <>
struct TiledAs<Mxfp4> {
  using Type = TiledMxfp4;
};
template <>
struct TiledAs<Grouped> {
  using Type = TiledGroups;
};
template <class Format>
using Tiled = typename TiledAs<Format>::Type;

// Whether segments of weights have no scales of their own.
template <class Format>
constexpr bool kUnitScales = false;
template <>
constexpr bool kUnitScales<Int8> = true;

constexpr int kTileLines = 16;  // of one product

template <class Format>
static void load_tiles() {
  Isa::load_tiles();
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
  const char *line = w.data, *next = fetch.next;
  for (int step = 0; step < steps; ++step, skip += 4 * kTileLines) {
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
    line += kTileLines * w.line_stride;
    next += kTileLines * w.line_stride;
  }
}

template <int count>
static HYBRID_INLINE void clear_tiles() {
  repeat<count>([](auto c) __attribute__((always_inline)) { Isa::clear_tile<c.value>(); });
}

// Sums [TM * 16][stride] bytes, TN blocks in a row.
template <int TM, int TN>
static HYBRID_INLINE void store_tile_sums(char* to, int64_t stride) {
  repeat<TM * TN>([&](auto c) __attribute__((always_inline)) {
    Isa::store_tile<c.value>(to + c.value / TN * kTileRows * stride + c.value % TN * kLine, stride);
  });
}

// What multiply() of ops/probe.h measures, on tiles.
template <class Format>
static double multiply_in_tiles(int64_t rounds) {
  alignas(64) char rows[2][kTileRows][kLine] = {}, lines[2][kTileRows][kLine] = {}, sums[4][kTileRows][kLine];
  const TileRows left[2] = {{rows[0][0], kLine}, {rows[1][0], kLine}};
  const Lines w{lines[0][0], kTileRows * kLine, kLine, nullptr, 0};
  load_tiles<Format>();
  clear_tiles<4>();
  for (int64_t i = 0; i < rounds; ++i) multiply_tiles<Format, 2>(left, 0, w, 1, Fetch{w.data, 0, 0});
  store_tile_sums<2, 2>(sums[0][0], 2 * kLine);
  release_tiles<Format>();
  return double(rounds) * 2.0 * Format::step_inputs * kTileLines * 4 * kTileRows * kBlock;
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
