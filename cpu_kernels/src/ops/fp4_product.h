// The product of wide rows with fp4 codes, as integers: 16 columns by 32 inputs (nvfp4: 16) are opened to unsigned
// bytes in registers, where all rows of a tile meet them. Blocks are read one after the other, so memory sees one
// stream.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

// A block, and which of its inputs: [first, last), from a multiple of 256 on.
struct Fp4Run {
  const char* block;
  int inputs, first, last;
  int ahead;  // bytes that lines are fetched ahead
};

// What the sums of the group from `input` on begin with.
template <class Format>
static HYBRID_INLINE int32_t wide_start(const char* row, const WideOffsets& at, int input) {
  const WideStart start = reinterpret_cast<const WideStart*>(row + at.starts)[input / kSumInputs];
  if (Format::layout.group == kSumInputs) return start.both;
  return input % kSumInputs ? start.both - start.first : start.first;
}

// Sums [MR][stride] += rows times the run; begun where that is the first, and finished where it is the last.
template <class Format, int level, int MR>
static HYBRID_KERNEL void multiply_fp4(const char* const* rows, const Fp4Run& run, float* sums, int stride) {
  constexpr Fp4Layout layout = Format::layout;
  constexpr int lines = layout.group / Format::line_inputs;
  const WideOffsets at(run.inputs);
  F32 total[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) total[r] = run.first ? Isa::load(sums + r * stride) : Isa::zero();
  const char* part = run.block + layout.front_bytes() + run.first / layout.part_inputs() * int64_t(layout.part_bytes());
  for (int first = run.first; first < run.last; first += kScaleInputs) {
    const int end = min(run.last, first + kScaleInputs);
    F32 scaled[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) scaled[r] = Isa::zero();
    for (int begin = first; begin < end; begin += layout.part_inputs(), part += layout.part_bytes()) {
      __builtin_prefetch(part + run.ahead, 0, level);
      const char *scales = part, *codes = part + kLine;
      const int groups_end = min(end, begin + layout.part_inputs());
      for (int input = begin; input < groups_end; input += layout.group, scales += kBlock, codes += lines * kLine) {
        typename Isa::Codes w[2 * lines];
#pragma GCC unroll 4
        for (int i = 0; i < lines; ++i) {
          __builtin_prefetch(codes + i * kLine + run.ahead, 0, level);
          w[2 * i] = Isa::load_fp4(codes + i * kLine, 0);
          w[2 * i + 1] = Isa::load_fp4(codes + i * kLine, 1);
        }
        const F32 scale = Format::group_scale(scales);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const auto part_sum = Isa::dot_wide(w, rows[r] + at.high + input, rows[r] + at.low + input,
                                              wide_start<Format>(rows[r], at, input));
          scaled[r] = Isa::fma(Isa::to_f32(part_sum), scale, scaled[r]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const float scale = reinterpret_cast<const float*>(rows[r] + at.scales)[first / kScaleInputs];
      total[r] =
          Isa::fma(scaled[r], Isa::set(scale * (0.5f / Format::smaller)), total[r]);  // codes are twice the value
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    if (run.last == run.inputs) total[r] = Format::finish_wide(total[r], run.block);
    Isa::store(sums + r * stride, total[r]);
  }
}

// One tile of rows over NB blocks, one after the other.
template <class Format, int level, int MR>
static HYBRID_INLINE void multiply_fp4_blocks(const Rows& left, int row, Fp4Run run, int blocks, int64_t block_bytes,
                                              float* sums) {
  const char* at[MR];
  for (int r = 0; r < MR; ++r) at[r] = left.at(row + r);
  for (int j = 0; j < blocks; ++j, run.block += block_bytes)
    multiply_fp4<Format, level, MR>(at, run, sums + (row * blocks + j) * kBlock, blocks * kBlock);
}

// All rows over some blocks. A single tile streams past; more pass over 256 inputs at a time, which stay in the cache,
// while the first of them fetches those that follow. sums: [rows][blocks][16].
template <class Format, class Ahead>
static HYBRID_INLINE void fp4_rows(const Rows& left, int rows, const char* first_block, int inputs, int blocks,
                                   float* sums) {
  constexpr Fp4Layout layout = Format::layout;
  const int64_t block_bytes = layout.block_bytes(inputs);
  if (rows <= Isa::max_rows) {
    with_rows<Isa::max_rows>(rows, [&](auto mr) __attribute__((always_inline)) {
      const Fp4Run run{first_block, inputs, 0, inputs, Ahead::ahead};
      multiply_fp4_blocks<Format, Ahead::level, mr.value>(left, 0, run, blocks, block_bytes, sums);
    });
    return;
  }
  constexpr int panel_bytes = kPanelInputs / layout.part_inputs() * layout.part_bytes();
  for (int first = 0; first < inputs; first += kPanelInputs) {
    for_row_tiles(rows, [&](auto mr, int row, int tile) __attribute__((always_inline)) {
      const Fp4Run run{first_block, inputs, first, min(inputs, first + kPanelInputs), tile ? 0 : panel_bytes};
      multiply_fp4_blocks<Format, Ahead::level, mr.value>(left, row, run, blocks, block_bytes, sums);
    });
  }
}

// As product().
template <class Format, class Epilogue>
static HYBRID_INLINE void fp4_product(const Rows& left, int rows, const char* matrix, int inputs, Range blocks,
                                      char* scratch, Epilogue epilogue) {
  float* const sums = reinterpret_cast<float*>(scratch);
  for_block_groups(blocks, [&](auto nb, int block) __attribute__((always_inline)) {
    const char* const first = matrix + block * Format::layout.block_bytes(inputs);
    with_reading<Format::ordered.near, Format::ordered.far, Isa::max_rows>(
        [&](auto ahead) { fp4_rows<Format, decltype(ahead)>(left, rows, first, inputs, nb.value, sums); });
    epilogue(Sums{sums, nb.value * kBlock, kBlock}, Range{0, rows}, block, nb.value);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
