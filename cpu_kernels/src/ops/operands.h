// Operands of the product, rows of activations and packed blocks of 16 columns, and how they are divided.
#pragma once

#include "formats/all.h"

namespace hybrid {
namespace HYBRID_ISA {

// Rows of the left operand, bf16 or int8 activation rows; `index` (may be null) picks them.
struct Rows {
  const char* base;
  int64_t stride;  // bytes
  const int32_t* index;

  HYBRID_INLINE const char* at(int row) const { return base + (index ? index[row] : row) * stride; }
};

// Operand lines: line i of block j lies at data + j * block_stride + i * line_stride. `header` is that of the first
// block, whose line `first` is the one at `data`.
struct Lines {
  const char* data;
  int64_t block_stride, line_stride;
  const char* header;
  int first;
};

// Finished sums of some rows and some adjacent blocks.
struct Sums {
  const float* data;
  int64_t row_stride, block_stride;  // floats

  HYBRID_INLINE F32 at(int row, int block) const { return Isa::load(data + row * row_stride + block * block_stride); }
};

constexpr int kRunBlocks = 4;  // threads share columns in multiples of this, the widest group of any Isa

// Calls function(Int<MR>) with the lowest that is at least `rows`: of MR, `apart` less and so on, and 1.
template <int MR, int apart = 1, class Function>
static HYBRID_INLINE void with_rows(int rows, Function function) {
  if constexpr (MR > 1) {
    constexpr int less = MR > apart ? MR - apart : 1;
    if (rows <= less) return with_rows<less, apart>(rows, function);
  }
  function(Int<MR>{});
}

template <int most = Isa::max_rows>
static HYBRID_INLINE int tile_count(int rows) {
  return (rows + most - 1) / most;
}

// Calls function(Int<MR>, first row, tile) for tiles of nearly equal height: a last tile of one row would waste most.
// apart: as with_rows has it.
template <int most = Isa::max_rows, int apart = 1, class Function>
static HYBRID_INLINE void for_row_tiles(int rows, Function function) {
  const int tiles = tile_count<most>(rows);
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int height = (rows - row + tiles - tile - 1) / (tiles - tile);
    with_rows<most, apart>(height, [&](auto mr) __attribute__((always_inline)) { function(mr, row, tile); });
    row += height;
  }
}

// Calls function(Int<NB>, first block): as wide as registers allow, then pairs, which gate and up need, then a last
// one.
template <int widest = Isa::max_blocks, class Function>
static HYBRID_INLINE void for_block_groups(Range blocks, Function function) {
  int block = blocks.first;
  for (; block + widest <= blocks.last; block += widest) function(Int<widest>{}, block);
  if constexpr (widest > 2)
    for (; block + 2 <= blocks.last; block += 2) function(Int<2>{}, block);
  if (block < blocks.last) function(Int<1>{}, block);
}

// Bytes from a line to the one that lies `count` after it; where scales lie among lines, from the first behind some.
template <class Format>
static HYBRID_INLINE int64_t lines_bytes(int count) {
  if constexpr (Format::scaled_lines) count += count / Format::scaled_lines;
  return int64_t(count) * kLine;
}

// Adjacent blocks of a packed matrix from block `block` on, each a header of scales and lines, or both by turns.
template <class Format>
struct Blocks {
  int inputs, lines, header_bytes;
  int64_t stride;  // from block to block
  const char* header;

  HYBRID_INLINE Blocks(const char* matrix, int inputs, int block)
      : inputs(inputs),
        lines(inputs / Format::line_inputs),
        header_bytes(Format::header(inputs)),
        stride(header_bytes + int64_t(lines) * kLine),
        header(matrix + block * stride) {}
  HYBRID_INLINE const char* line(int i) const {
    return header + (Format::scaled_lines ? kLine : header_bytes) + lines_bytes<Format>(i);
  }
  HYBRID_INLINE Lines from(int i) const { return {line(i), stride, kLine, header, i}; }
  // Those from the block on that lies `count` behind the first.
  HYBRID_INLINE Blocks behind(int count) const {
    Blocks some = *this;
    some.header += count * stride;
    return some;
  }
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
