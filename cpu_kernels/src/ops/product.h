// The one matrix product: rows of bf16 times packed blocks, accumulated in fp32 registers, handed to an epilogue.
//
// Every output element is one chain of fused dot products over k in ascending order, whatever the number of rows,
// threads or panels: so a token's result does not depend on what it is batched with.
#pragma once

#include "ops/common.h"

namespace hybrid {
namespace HYBRID_ISA {

// Rows of the left operand; `index` (may be null) picks them.
struct Rows {
  const bf16* base;
  int64_t stride;  // elements
  const int32_t* index;

  HYBRID_INLINE const bf16* at(int row) const { return base + (index ? index[row] : row) * stride; }
};

// Packed right operand: line i of block j lies at data + j * block_stride + i * line_stride.
struct Blocks {
  const char* data;
  int64_t block_stride;
  int64_t line_stride;
  int pairs;  // lines in a block
};

// acc[r][j] += rows a[r] times block j, over `pairs` lines from b. Beside every step, `fetch` lines laid out as the
// blocks are, from `next` on, are asked for: what comes next is read from memory while this is multiplied.
template <int fetch, int MR, int NB>
static HYBRID_INLINE void multiply(F32 (&acc)[MR][NB], const bf16* const (&a)[MR], const char* b, const Blocks& w,
                                   int pairs, const char* next) {
  for (int i = 0; i < pairs; ++i) {
    Isa::Line line[NB];
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) line[j] = Isa::load_line(b + j * w.block_stride);
#pragma GCC unroll 8
    for (int j = 0; j < fetch; ++j) __builtin_prefetch(next + j * w.block_stride, 0, fetch == NB ? 3 : 2);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Isa::Pair pair = Isa::load_pair(a[r] + 2 * i);
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) acc[r][j] = Isa::dot(acc[r][j], line[j], pair);
    }
    b += w.line_stride;
    next += w.line_stride;
  }
}

// The same for tile `tile` of `tiles` that pass over the same lines one after another: they share the fetching of the
// group of blocks at `next`, so that memory is asked at an even pace.
template <int MR, int NB>
static HYBRID_INLINE void multiply_shared(F32 (&acc)[MR][NB], const bf16* const (&a)[MR], const char* b,
                                          const Blocks& w, int pairs, int tile, int tiles, const char* next) {
  if (tiles == 1) return multiply<NB>(acc, a, b, w, pairs, next);
  constexpr int two = NB < 2 ? NB : 2;
  const int each = tiles < NB ? two : 1;
  next += each * tile * w.block_stride;
  if (each * tile >= NB) return multiply<0>(acc, a, b, w, pairs, next);
  if (each == 1) return multiply<1>(acc, a, b, w, pairs, next);
  multiply<two>(acc, a, b, w, pairs, next);
}

template <int MR, class Function>
static HYBRID_INLINE void with_rows(int rows, Function function) {
  if constexpr (MR > 1) {
    if (rows < MR) return with_rows<MR - 1>(rows, function);
  }
  function(Int<MR>{});
}

static HYBRID_INLINE int tile_count(int rows) { return (rows + Isa::max_rows - 1) / Isa::max_rows; }

// Calls function(Int<MR>, first row, tile) for tiles of nearly equal height: a last tile of one row would waste most.
template <class Function>
static HYBRID_INLINE void for_row_tiles(int rows, Function function) {
  const int tiles = tile_count(rows);
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int height = (rows - row + tiles - tile - 1) / (tiles - tile);
    with_rows<Isa::max_rows>(height, [&](auto mr) __attribute__((always_inline)) { function(mr, row, tile); });
    row += height;
  }
}

// Calls function(Int<NB>, first block): as wide as registers allow, then what is left in multiples of `unit`.
template <int unit, class Function>
static HYBRID_INLINE void for_block_groups(Range blocks, Function function) {
  int block = blocks.first;
  for (; block + Isa::max_blocks <= blocks.last; block += Isa::max_blocks) function(Int<Isa::max_blocks>{}, block);
  for (; block < blocks.last; block += unit) function(Int<unit>{}, block);
}

constexpr int kRunBlocks = 4;       // threads share columns in multiples of this, the widest group of any Isa
constexpr int kPanelPairs = 128;    // a panel of 4 blocks is 32 KiB: it stays in L1 while all rows pass over it
constexpr int kStreamAhead = 3072;  // bytes: memory latency times one core's share of the bandwidth

// product[r, c] for rows [0, rows) and the given blocks, each finished tile passed to
// epilogue(acc, first row, first block). scratch: rows * max_blocks * 16 floats, used when k takes several panels.
template <int unit, class Epilogue>
static void product(const Rows& left, int rows, const Blocks& w, Range blocks, float* scratch, Epilogue epilogue) {
  const int tiles = tile_count(rows);
  for_block_groups<unit>(blocks, [&](auto nb, int block) __attribute__((always_inline)) {
    constexpr int NB = decltype(nb)::value;
    const char* group = w.data + block * w.block_stride;
    const int panel = tiles == 1 ? w.pairs : kPanelPairs;
    for (int start = 0; start < w.pairs; start += panel) {
      const int pairs = least(panel, w.pairs - start);
      const bool last_panel = start + pairs == w.pairs;
      const char* b = group + start * w.line_stride;
      const int64_t to_next = last_panel ? NB * w.block_stride - start * w.line_stride : pairs * w.line_stride;
      for_row_tiles(rows, [&](auto mr, int row, int tile) __attribute__((always_inline)) {
        constexpr int MR = decltype(mr)::value;
        const bf16* a[MR];
        F32 acc[MR][NB];
        float* saved = scratch + row * NB * kBlock;
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          a[r] = left.at(row + r) + 2 * start;
#pragma GCC unroll 8
          for (int j = 0; j < NB; ++j) acc[r][j] = start == 0 ? Isa::zero() : Isa::load(saved + (r * NB + j) * kBlock);
        }
        if (tiles == 1) {
          // The stream runs on into the next group, so the last lines fetch that group's first.
          const int lead = least(kStreamAhead / kLine, pairs), main = pairs - lead;
          const char* ahead = b + lead * w.line_stride;
          multiply<NB>(acc, a, b, w, main, ahead);
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) a[r] += 2 * main;
          multiply<NB>(acc, a, b + main * w.line_stride, w, lead, b + NB * w.block_stride);
        } else {
          multiply_shared(acc, a, b, w, pairs, tile, tiles, b + to_next);
        }
        if (last_panel) return epilogue(acc, row, block);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
          for (int j = 0; j < NB; ++j) Isa::store(saved + (r * NB + j) * kBlock, acc[r][j]);
      });
    }
  });
}

// The same in one panel, for operands that are read once for few rows or fit the caches: attention's scores and values.
// row_at(row) points to a row; meanwhile the blocks at `next`, laid out as those of w, are fetched.
template <class RowAt, class Epilogue>
static HYBRID_INLINE void small_product(RowAt row_at, int rows, const Blocks& w, int blocks, const char* next,
                                        Epilogue epilogue) {
  const int tiles = tile_count(rows);
  for_block_groups<1>({0, blocks}, [&](auto nb, int block) __attribute__((always_inline)) {
    constexpr int NB = decltype(nb)::value;
    for_row_tiles(rows, [&](auto mr, int row, int tile) __attribute__((always_inline)) {
      constexpr int MR = decltype(mr)::value;
      const bf16* a[MR];
      F32 acc[MR][NB];
      for (int r = 0; r < MR; ++r) {
        a[r] = row_at(row + r);
        for (int j = 0; j < NB; ++j) acc[r][j] = Isa::zero();
      }
      const int64_t offset = block * w.block_stride;
      multiply_shared(acc, a, w.data + offset, w, w.pairs, tile, tiles, next + offset);
      for (int r = 0; r < MR; ++r)
        for (int j = 0; j < NB; ++j) epilogue(acc[r][j], row + r, block + j);
    });
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
