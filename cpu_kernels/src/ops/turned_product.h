// Scores where keys are values too: what is read for the product is turned on the way into operands of the weighted
// sum, so that shuffles run beside multiplications and a key comes from memory once.
#pragma once

#include "ops/small_product.h"

namespace hybrid {
namespace HYBRID_ISA {

constexpr int kTurned = kBlock / 2;  // lines that are turned at once: 16 dimensions of 16 keys

// Where key blocks become operands.
struct TurnedPlace {
  char* keys;       // unless they are operands as they lie
  char* values;     // kTurnedBytes for every 16 dimensions
  int value_lines;  // of each key block as many operands, the first, are values
};

template <class Format>
static HYBRID_INLINE Lines turned_keys(const Lines& w, int count, const TurnedPlace& to) {
  if constexpr (Format::opened) return w;
  return {to.keys, int64_t(count) * kLine, kLine, nullptr, 0};
}

// Operand line + i of `block` and those stored with it, once for all of these; line is a multiple of kTurned.
template <class Format>
static HYBRID_INLINE void open_key(const Lines& w, int block, int line, int i, const Lines& keys,
                                   const TurnedPlace& to) {
  if constexpr (!Format::opened) {
    if (i % Format::steps == 0)
      Format::open(w.data + block * w.block_stride + (line + i) / Format::steps * kLine, {},
                   to.keys + block * keys.block_stride + (line + i) * kLine);
  }
}

// Operands [line, line + kTurned) of `block` as values.
static HYBRID_INLINE void turn_keys(const Lines& keys, int block, int line, const TurnedPlace& to) {
  if (line >= to.value_lines) return;
  Isa::turn_lines(keys.data + block * keys.block_stride + line * kLine,
                  to.values + line / kTurned * kTurnedBytes + block * kTurned * kLine);
}

// The first tile of rows over NB key blocks of `count` operands each, which opens them, turns them and asks for
// `fetched` of the blocks at `next`. Little of each at a time, behind the products of a line: processors look some
// hundred instructions ahead for what can run at once. out: [MR][NB][16].
template <class Format, int MR, int NB>
static HYBRID_KERNEL void turning_tile(const char* const (&a)[MR], const Lines& w, int count, const TurnedPlace& to,
                                       const char* next, int fetched, float* out) {
  const Lines keys = turned_keys<Format>(w, count, to);
  F32 sums[MR][NB];
  load_sums(sums, nullptr);
  for (int i = 0; i < kTurned; ++i)
    for (int j = 0; j < NB; ++j) open_key<Format>(w, j, 0, i, keys, to);
  for (int line = 0; line < count; line += kTurned) {
    for (int j = 0; j < fetched; ++j)
      for (int i = 0; i < kTurned / Format::steps; ++i)
        __builtin_prefetch(next + j * w.block_stride + (line / Format::steps + i) * kLine, 0, Far::level);
#pragma GCC unroll 8
    for (int i = 0; i < kTurned; ++i) {
      if (line + kTurned < count)
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) open_key<Format>(w, j, line + kTurned, i, keys, to);
      if (i * NB % kTurned == 0) turn_keys(keys, i * NB / kTurned, line, to);
      const char* rows[MR];
      advance<Bf16>(rows, a, line + i);
      multiply<Bf16, 0>(sums, rows, {keys.data + (line + i) * kLine, keys.block_stride, kLine, nullptr, 0}, 1, next);
    }
  }
  store_sums(out, sums);
}

// As small_product() for key blocks that are turned meanwhile; w and `next` are as they are stored, `count` is in
// operands.
template <class Format, class RowAt, class Epilogue>
static HYBRID_INLINE void turned_product(const Tiles<Bf16>& tiles, RowAt row_at, int rows, const Lines& w, int count,
                                         int blocks, const TurnedPlace& to, const char* next, Epilogue epilogue) {
  if constexpr (Isa::has_tiles) {
    if (tiles.multiply(rows)) {
      const Lines keys = turned_keys<Format>(w, count, to);
      for (int block = 0; block < blocks; ++block) {
        for (int line = 0; line < count; line += kTurned) {
          for (int i = 0; i < kTurned; ++i) open_key<Format>(w, block, line, i, keys, to);
          turn_keys(keys, block, line, to);
        }
      }
      return small_tile_product(row_at, rows, keys, count, blocks, Format::opened ? next : keys.data, epilogue);
    }
  }
  const int passes = tile_count(rows);
  for_block_groups({0, blocks}, [&](auto nb, int block) __attribute__((always_inline)) {
    constexpr int NB = decltype(nb)::value;
    const Lines lines = from_block(w, block), keys = turned_keys<Format>(lines, count, to);
    const TurnedPlace place{to.keys, to.values + block * kTurned * kLine, to.value_lines};
    const char* ahead = next + block * w.block_stride;
    for_row_tiles(rows, [&](auto mr, int row, int tile) __attribute__((always_inline)) {
      constexpr int MR = decltype(mr)::value;
      // Later tiles fetch too if lines lie there as they do here.
      if (tile > 0)
        return small_rows<Bf16, MR, NB>(row_at, row, keys, count, block, tile, passes,
                                        Format::opened ? ahead : keys.data, epilogue);
      const int fetched = Format::opened ? fetched_blocks(passes, NB) : NB;
      with_tile<MR, NB>(
          row_at, row, block,
          [&](auto& a, float* sums) { turning_tile<Format, MR, NB>(a, lines, count, place, ahead, fetched, sums); },
          epilogue);
    });
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
