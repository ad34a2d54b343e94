// The product of formats of codes in groups. Every output element is one chain of operations, as in ops/product.h.
#pragma once

#include "ops/product.h"

namespace hybrid {
namespace HYBRID_ISA {

// Calls function(Int<bits>) for codes of so many, or of kTable.
template <class Function>
static HYBRID_INLINE void with_bits(int bits, Function function) {
  if (bits == kTable) return function(Int<kTable>{});
  if (bits == 2) return function(Int<2>{});
  if (bits == 4) return function(Int<4>{});
  if (bits == 5) return function(Int<5>{});
  if (bits == 6) return function(Int<6>{});
  function(Int<8>{});
}

// Asks for a line of each of NB blocks.
template <int NB, int level>
static HYBRID_INLINE void fetch_line(const char* at, int64_t stride) {
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j) __builtin_prefetch(at + j * stride, 0, level);
}

template <GroupScales of>
struct Kind {
  static constexpr GroupScales scales = of;
};

// Calls function(Int<bits>, kind) for what codes and scales there are; kind::scales is a constant.
template <class Function>
static HYBRID_INLINE void with_codes(const GroupLayout& layout, Function function) {
  if (layout.scales == GroupScales::tabled) return function(Int<kTable>{}, Kind<GroupScales::tabled>{});
  if (layout.scales == GroupScales::small_superblocks)
    return function(Int<2>{}, Kind<GroupScales::small_superblocks>{});
  if (layout.scales == GroupScales::small_groups) return function(Int<6>{}, Kind<GroupScales::small_groups>{});
  if (layout.bits == 8) return function(Int<8>{}, Kind<GroupScales::halves>{});
  const auto with_scales = [&](auto bits) __attribute__((always_inline)) {
    if (layout.scales == GroupScales::halves) return function(bits, Kind<GroupScales::halves>{});
    if (layout.scales == GroupScales::minima) return function(bits, Kind<GroupScales::minima>{});
    function(bits, Kind<GroupScales::superblocks>{});
  };
  if (layout.bits == 4) return with_scales(Int<4>{});
  with_scales(Int<5>{});
}

// A tile of rows: lines stream past once, in order, fetched some way ahead. out: sums [MR][NB][16], rows `stride`
// floats apart.
template <int bits, GroupScales scales, class Ahead, int MR, int NB>
static HYBRID_KERNEL void stream_groups(const char* const* rows, const GroupBlocks& w, float* out, int stride) {
  static_assert(NB == 1 || !Ahead::ordered);
  constexpr int group = group_inputs(bits), steps = group / 4;
  using Opened = OpenedGroups<group, small_code_steps(bits)>;
  constexpr GroupLayout layout{bits == kTable ? 4 : bits, 0, scales};
  constexpr int part_lines = layout.part_bytes() / kLine, part_steps = kInputs / 4;
  constexpr int head_bytes = layout.head_bytes();
  const F32 offset = Isa::set(-float(w.layout.offset));
  F32 sums[MR][NB];
  load_sums(sums, nullptr);
  for (int input = 0; input < w.inputs; input += kInputs) {
    const char *const at = w.part(input), *const factors = w.span(input);
    const char* next = at + Ahead::ahead + (at + Ahead::ahead < w.first + w.stride ? 0 : (NB - 1) * w.stride);
    if (layout.factor_bytes() && input % kScaleInputs == 0) fetch_line<NB, Ahead::level>(next - kLine, w.stride);
#pragma GCC unroll 4
    for (int g = 0; g < kInputs; g += group) {
      const GroupCodes<bits> codes(at + head_bytes, g, w.table());
      Isa::I32 part[MR][NB];
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) part[r][j] = Isa::set_int(0);
      const auto run = [&](auto& acc, int first, int last) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int step = first; step < last; ++step) {
          const int done = g / 4 + step;
#pragma GCC unroll 2
          for (int i = done * part_lines / part_steps; i < (done + 1) * part_lines / part_steps; ++i)
            fetch_line<NB, Ahead::level>(next + i * kLine, w.stride);
          typename Opened::Line operand[NB];
#pragma GCC unroll 8
          for (int j = 0; j < NB; ++j) operand[j] = codes.operand(j * w.stride, step);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) {
            const auto value = Opened::value(rows[r] + input + g + 4 * step);
#pragma GCC unroll 8
            for (int j = 0; j < NB; ++j) acc[r][j] = Isa::dot(acc[r][j], operand[j], value);
          }
        }
      };
      add_parts<Opened>(part, 0, steps, run);
      const auto scales_of = [&](int j) __attribute__((always_inline)) {
        return open_scale<scales>(at + j * w.stride, factors + j * w.stride, g / group, offset);
      };
      merge_group<Opened>(sums, part, rows, w.inputs, (input + g) / 4, scales_of);
    }
  }
  store_sums(out, sums, stride);
}

// Where scales of an opened block are in its panel: behind its lines of int8.
constexpr int kScalesOffset = kPanelInputs / 4 * kLine;

// Groups opened there as blocks whose headers are their scales.
template <class Opened>
static HYBRID_INLINE Blocks<Opened> opened_blocks(const char* opened, int inputs) {
  Blocks<Opened> w(opened + kScalesOffset, inputs, 0);
  w.stride = kPanelBytes;
  return w;
}

// Inputs [first, last) of `blocks` blocks opened, `kPanelBytes` a block; meanwhile what lies as far ahead as they are
// long is fetched.
template <int bits>
static HYBRID_KERNEL void open_groups(const GroupBlocks& w, int blocks, int first, int last, char* out) {
  constexpr int group = group_inputs(bits), steps = group / 4;
  open_scales(w, blocks, first, last, reinterpret_cast<float*>(out + kScalesOffset), kPanelBytes / sizeof(float));
  for (int j = 0; j < blocks; ++j, out += kPanelBytes) {
    char* line = out;
    for (int input = first; input < last; input += kInputs) {
      const char* const at = w.part(input) + j * w.stride;
      const char* next = at + w.span_bytes + (input + kPanelInputs < w.inputs ? 0 : (blocks - 1) * w.stride);
      if (w.layout.factor_bytes() && input == first) __builtin_prefetch(next - kLine, 0, 2);
      for (int i = 0; i < w.part_bytes; i += kLine) __builtin_prefetch(next + i, 0, 2);
      for (int g = 0; g < kInputs; g += group) {
        const GroupCodes<bits> codes(at + w.layout.head_bytes(), g, w.table() + j * w.stride);
#pragma GCC unroll 8
        for (int step = 0; step < steps; ++step, line += kLine) codes.open(0, step, line);
      }
    }
  }
}

// Many rows: panel by panel, all tiles over each. sums: [rows][NB][16].
template <class Opened, int NB>
static HYBRID_KERNEL Sums group_panels(const Rows& left, int rows, const GroupBlocks& w, float* sums, char* opened) {
  const auto opened_w = opened_blocks<Opened>(opened, w.inputs);
  for (int first = 0; first < w.inputs; first += kPanelInputs) {
    const int last = min(w.inputs, first + kPanelInputs);
    with_bits(w.layout.codes(), [&](auto bits) { open_groups<bits.value>(w, NB, first, last, opened); });
    Panel panel{{opened, kPanelBytes, kLine, nullptr, first / 4}, last / 4, 0, tile_count(rows), opened};
    pass_blocks<Opened, NB>(left, rows, opened_w, panel, sums);
  }
  return panel_sums<Opened, NB>(sums, rows);
}

// Calls function(what codes are opened as).
template <class Function>
static HYBRID_INLINE Sums with_opened(int bits, Function function) {
  if (bits == kTable) return function(OpenedGroups<16, small_code_steps(8)>{});
  if (group_inputs(bits) == 16) return function(OpenedGroups<16, small_code_steps(6)>{});
  if (bits == 8) return function(OpenedGroups<32, small_code_steps(8)>{});
  if (bits == 4) return function(OpenedGroups<32, small_code_steps(4)>{});
  return function(OpenedGroups<32, small_code_steps(5)>{});
}

// Of codes of so many bits, or of kTable.
static constexpr OrderedRows ordered_rows(int bits) {
  if (bits == kTable) return {1, 1};
  if (bits == 2) return {0, 0};
  if (bits == 4) return {2, 4};
  if (bits == 5) return {1, 4};
  if (bits == 6) return {0, 2};
  return {2, 2};
}

template <int bits, GroupScales scales, int MR, int NB>
static HYBRID_INLINE void stream_group_blocks(const char* const* rows, const GroupBlocks& w, float* out) {
  constexpr OrderedRows ordered = ordered_rows(bits);
  for_streams<ordered.near, ordered.far, MR, NB, MR <= kAbreastRows ? NB : kAlone>(
      [&](auto ahead, auto together, int j) __attribute__((always_inline)) {
        stream_groups<bits, scales, decltype(ahead), MR, together.value>(rows, w.behind(j), out + j * kBlock,
                                                                         NB * kBlock);
      });
}

template <int NB>
static HYBRID_KERNEL void stream_rows(const Rows& left, int rows, const GroupBlocks& w, float* sums) {
  for_row_tiles<Isa::group_rows, 2>(rows, [&](auto mr, int row, int) __attribute__((always_inline)) {
    constexpr int MR = decltype(mr)::value;
    const char* at[MR];
    for (int r = 0; r < MR; ++r) at[r] = left.at(min(row + r, rows - 1));
    with_codes(w.layout, [&](auto bits, auto kind) __attribute__((always_inline)) {
      stream_group_blocks<bits.value, decltype(kind)::scales, MR, NB>(at, w, sums + row * NB * kBlock);
    });
  });
}

// As product(). Odd numbers of rows are multiplied as one more, whose sums end where those of the next tile or the
// panel would begin.
template <class Epilogue>
static HYBRID_INLINE void group_product(const Grouped& format, const Rows& left, int rows, const char* matrix,
                                        int inputs, Range blocks, char* scratch, Epilogue epilogue) {
  float* const sums = reinterpret_cast<float*>(scratch);
  for_block_groups(blocks, [&](auto nb, int block) __attribute__((always_inline)) {
    constexpr int NB = decltype(nb)::value;
    const GroupBlocks w(format.layout, matrix, inputs, block);
    if constexpr (!Isa::streams_codes) {
      if (rows > Isa::group_rows) {
        const Sums made = with_opened(w.layout.codes(), [&](auto format) __attribute__((always_inline)) {
          return group_panels<decltype(format), NB>(left, rows, w, sums, scratch + sums_bytes(rows, NB));
        });
        return epilogue(made, Range{0, rows}, block, NB);
      }
    }
    if constexpr (Isa::group_rows > 0) stream_rows<NB>(left, rows, w, sums);
    epilogue(Sums{sums, NB * kBlock, kBlock}, Range{0, rows}, block, NB);
  });
}

}  // namespace HYBRID_ISA
}  // namespace hybrid
