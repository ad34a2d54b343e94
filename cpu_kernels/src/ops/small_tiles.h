// Attention's products on matrix tiles, as ops/small_product.h has them for registers.
#pragma once

#include "ops/tiles.h"

namespace hybrid {
namespace HYBRID_ISA {

// From one copied row to the next: a line further apart than they are long, so that they do not compete for one set of
// the cache.
static HYBRID_INLINE int64_t copy_stride(int64_t row_bytes) { return row_bytes + kLine; }

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

// The last tile product of `count` lines where it has but 8: zeros stand for the rest, whatever lies there.
template <int TM, int TN>
static HYBRID_INLINE void multiply_half(const TileRows (&left)[TM], const Lines& w, int count) {
  alignas(64) char values[TM][kTileRows][kLine] = {}, lines[TN][kTileRows][kLine] = {};
  const int done = count / 16 * 16;
  TileRows rows[TM];
  for (int i = 0; i < TM; ++i) {
    for (int r = 0; r < kTileRows; ++r)
      __builtin_memcpy(values[i][r], left[i].data + r * left[i].stride + 4 * done, kLine / 2);
    rows[i] = {values[i][0], kLine};
  }
  for (int j = 0; j < TN; ++j)
    for (int i = 0; i < 8; ++i)
      __builtin_memcpy(lines[j][i], w.data + j * w.block_stride + (done + i) * w.line_stride, kLine);
  multiply_tiles<Bf16, TN>(rows, 0, Lines{lines[0][0], kTileRows * kLine, kLine, nullptr, 0}, 1, Fetch{w.data, 0, 0});
}

// sums: [TM * 16][TN][16]
template <int TM, int TN>
static HYBRID_KERNEL void small_pass(const LeftTiles& from, const Lines& w, int count, const Fetch& fetch, char* sums) {
  TileRows left[TM];
  for (int i = 0; i < TM; ++i) left[i] = from.at(i * kTileRows);
  clear_tiles<TM * TN>();
  multiply_tiles<Bf16, TN>(left, 0, w, count / 16, fetch);
  if (count % 16) multiply_half<TM, TN>(left, w, count);
  store_tile_sums<TM, TN>(sums, TN * kLine);
}

// As small_product(); count is a multiple of 8 and at most kMaxHeadDim / 2.
template <class RowAt, class Epilogue>
static HYBRID_INLINE void small_tile_product(RowAt row_at, int rows, const Lines& w, int count, int blocks,
                                             const char* next, Epilogue epilogue) {
  alignas(64) char copies[2 * kTileRows * (2 * kMaxHeadDim + kLine)];
  alignas(64) float sums[2 * kTileRows * 2 * kBlock];
  for (int row = 0, pass = 0; row < rows; row += 2 * kTileRows, ++pass) {
    const int some = min(2 * kTileRows, rows - row);
    const auto some_row = [&](int i) { return reinterpret_cast<const char*>(row_at(row + i)); };
    const LeftTiles left(some_row, some, 4 * count, copies);
    for_block_groups({0, blocks}, [&](auto nb, int block) __attribute__((always_inline)) {
      for_tiles<nb.value>(some, [&](auto tm, auto tn, int, int j, int) __attribute__((always_inline)) {
        const int64_t offset = (block + j) * w.block_stride;
        const Lines lines{w.data + offset, w.block_stride, w.line_stride, nullptr, 0};
        small_pass<tm.value, tn.value>(left, lines, count, share_fetch(next + offset, pass, tile_passes(rows)),
                                       reinterpret_cast<char*>(sums));
        for (int r = 0; r < some; ++r)
          for (int k = 0; k < tn.value; ++k)
            epilogue(Isa::load(sums + (r * tn.value + k) * kBlock), row + r, block + j + k);
      });
    });
  }
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
