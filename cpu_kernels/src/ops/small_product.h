// Products of operands that are read once for few rows or fit the caches: attention's scores and values.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

// out [MR][NB][16]: rows a[r] times `count` stored lines of NB blocks.
template <class Format, int MR, int NB>
static HYBRID_KERNEL void small_tile(const char* const (&a)[MR], const Lines& w, int count, int tile, int tiles,
                                     const char* next, float* out) {
  F32 sums[MR][NB];
  load_sums(sums, nullptr);
  multiply_shared<Format>(sums, a, w, count, tile, tiles, next);
  store_sums(out, sums);
}

// `count` stored lines of NB blocks as operands, block after block.
template <class Format, int NB>
static HYBRID_KERNEL Lines open_small(const Lines& w, int count, char* out) {
  const int64_t block = int64_t(count) * Format::steps * kLine;
  for (int i = 0; i < count; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) {
      const char* line = w.data + j * w.block_stride + i * w.line_stride;
      Format::open(line, {}, out + j * block + i * Format::steps * kLine);
    }
  }
  return {out, block, kLine, out, 0};
}

constexpr int kFullSums = Isa::max_rows * Isa::max_blocks;
// Rows of a single tile beside two blocks: as many sums as a tile of full width and height has.
constexpr int kNarrowRows = kFullSums / 2;
// Rows beside one block where lines are operands as they lie.
constexpr int kOrderedRows = kFullSums / 3;

// Whether rows are so few that reading decides, not arithmetic.
template <class Format, int MR>
constexpr bool kReads = Format::opened || MR * Isa::max_blocks <= kFullSums * 2 / 3;

// Blocks beside each other in a single tile: one is enough where its lines are operands as they lie and there are sums
// of several rows, so that none waits for the one before.
template <class Format, int MR>
static constexpr int narrow_blocks() {
  if (Format::opened && MR > 1) return 1;
  return kReads<Format, MR> ? Isa::max_blocks : 2;
}

// small_tile() for a single tile, which fetches what lies at `next` in the order of addresses.
template <class Format, int MR, int NB>
static HYBRID_KERNEL void ordered_tile(const char* const (&a)[MR], const Lines& w, int count, const char* next,
                                       float* out) {
  F32 sums[MR][NB];
  load_sums(sums, nullptr);
  const char* line = w.data;
  const int64_t block_stride = w.block_stride, line_stride = w.line_stride;
  for (int i = 0; i < count; ++i, line += line_stride, next += NB * kLine) {
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) __builtin_prefetch(next + j * kLine, 0, Far::level);
    const char* rows[MR];
    advance<Format>(rows, a, i);
    multiply<Format, 0>(sums, rows, {line, block_stride, line_stride, nullptr, 0}, 1, nullptr);
  }
  store_sums(out, sums);
}

// Rows from `row` on times NB blocks from `block` on: run(rows, sums [MR][NB][16]), then the epilogue.
template <int MR, int NB, class RowAt, class Run, class Epilogue>
static HYBRID_INLINE void with_tile(RowAt row_at, int row, int block, Run run, Epilogue epilogue) {
  const char* a[MR];
  alignas(64) float sums[MR][NB][kBlock];
  for (int r = 0; r < MR; ++r) a[r] = reinterpret_cast<const char*>(row_at(row + r));
  run(a, sums[0][0]);
  for (int r = 0; r < MR; ++r)
    for (int j = 0; j < NB; ++j) epilogue(Isa::load(sums[r][j]), row + r, block + j);
}

template <class Format, int MR, int NB, class RowAt, class Epilogue>
static HYBRID_INLINE void small_rows(RowAt row_at, int row, const Lines& w, int count, int block, int tile, int tiles,
                                     const char* next, Epilogue epilogue) {
  with_tile<MR, NB>(
      row_at, row, block,
      [&](auto& a, float* sums) { small_tile<Format, MR, NB>(a, w, count, tile, tiles, next, sums); }, epilogue);
}

static HYBRID_INLINE Lines from_block(const Lines& w, int block) {
  return {w.data + block * w.block_stride, w.block_stride, w.line_stride, w.data, 0};
}

// small_product() for a single tile: lines are made operands in registers.
template <class Format, int most_rows, class RowAt, class Epilogue>
static HYBRID_INLINE void narrow_product(RowAt row_at, int rows, const Lines& w, int count, int blocks,
                                         const char* next, Epilogue epilogue) {
  with_rows<most_rows>(rows, [&](auto mr) __attribute__((always_inline)) {
    constexpr int MR = decltype(mr)::value;
    for_block_groups<narrow_blocks<Format, MR>()>({0, blocks}, [&](auto nb, int block) __attribute__((always_inline)) {
      constexpr int NB = decltype(nb)::value;
      const Lines lines = from_block(w, block);
      const auto run = [&](auto& a, float* sums) {
        if constexpr (kReads<Format, MR>) {
          const char* const ahead = next + int64_t(block) * count * kLine;
          if (Format::opened || reading == Reading::ordered)
            return ordered_tile<Format, MR, NB>(a, lines, count, ahead, sums);
        }
        if constexpr (!Format::opened)
          small_tile<Format, MR, NB>(a, lines, count, 0, 1, next + block * w.block_stride, sums);
      };
      with_tile<MR, NB>(row_at, 0, block, run, epilogue);
    });
  });
}

// The same for many rows: groups of blocks are made operands once for all rows, in `opened`.
template <class Format, class RowAt, class Epilogue>
static HYBRID_INLINE void opened_product(const Tiles<Bf16>& tiles, RowAt row_at, int rows, const Lines& w, int count,
                                         int blocks, const char* next, char* opened, Epilogue epilogue) {
  const int passes = tile_count(rows), pairs = count * Format::steps;
  for_block_groups({0, blocks}, [&](auto nb, int block) __attribute__((always_inline)) {
    constexpr int NB = decltype(nb)::value;
    Lines lines = from_block(w, block);
    const char* ahead = next + block * (Format::opened ? w.block_stride : int64_t(count) * kLine);
    if constexpr (!Format::opened) lines = open_small<Format, NB>(lines, count, opened);
    if constexpr (Isa::has_tiles) {
      const auto shifted = [&](F32 sums, int row, int j) { epilogue(sums, row, block + j); };
      if (tiles.multiply(rows)) return small_tile_product(row_at, rows, lines, pairs, NB, ahead, shifted);
    }
    // A stored line has become `steps` operands: their tiles fetch as if they were so many times more.
    for_row_tiles(rows, [&](auto mr, int row, int tile) __attribute__((always_inline)) {
      small_rows<Bf16, decltype(mr)::value, NB>(row_at, row, lines, pairs, block, tile, passes * Format::steps, ahead,
                                                epilogue);
    });
  });
}

// row_at(row) points to a row of as many bf16 as `count` stored lines have inputs; meanwhile as many lines at `next`,
// laid out as those of w, are fetched. opened: scratch of max_blocks * count * steps lines, where lines are no operands
// as they lie. epilogue(sums of 16 columns, row, block).
template <class Format, class RowAt, class Epilogue>
static HYBRID_INLINE void small_product(const Tiles<Bf16>& tiles, RowAt row_at, int rows, const Lines& w, int count,
                                        int blocks, const char* next, char* opened, Epilogue epilogue) {
  if constexpr (Format::opened && Isa::has_tiles) {
    if (tiles.multiply(rows)) return small_tile_product(row_at, rows, w, count, blocks, next, epilogue);
  }
  constexpr int narrow = Format::opened ? kOrderedRows : kNarrowRows;
  if (rows <= narrow && (!Format::opened || reading == Reading::ordered) && !tiles.multiply(rows))
    return narrow_product<Format, narrow>(row_at, rows, w, count, blocks, next, epilogue);
  opened_product<Format>(tiles, row_at, rows, w, count, blocks, next, opened, epilogue);
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
