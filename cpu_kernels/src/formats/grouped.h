// Codes of 2, 4, 5, 6 or 8 bits, or for 16 bytes of a table, in groups of 32 or 16 inputs. Whatever a format's scales
// are, they are opened to fp32, a scale and a minimum for each group and column: few rows do so on the way; for many,
// 256 inputs are opened first, so that their kernels know but how large a group is. The minimum, which stands for the
// offset of codes as well, is multiplied by the sum of the activations, which have a scale and a sum for each 32. On
// matrix tiles they are bf16: ops/tiles.h.
#pragma once

#include "executor/grouped.h"
#include "formats/kinds.h"

namespace hybrid {
namespace HYBRID_ISA {

struct Grouped {
  static constexpr bool integer = true;
  static constexpr bool grouped = true;
  static constexpr bool wide = false;
  static constexpr bool tiled = true;
  static constexpr bool opened = false;
  static constexpr int step_inputs = 4;
  static constexpr int tile_rows = 16;
  GroupLayout layout;
};

constexpr int kGroupFloats = 2 * kBlock;  // of one group: scales, then minima

struct RowPart {
  float scale, sum;
};

// Of a group of 16 columns.
struct OpenedScales {
  F32 scale, minimum;
};

// Steps of codes that Isa::Small adds up.
static constexpr int small_code_steps(int bits) { return Isa::small_steps(bits == kTable ? 8 : bits); }

// Groups of 256 inputs after they were opened: lines of int8 as operands, and scales and minima.
template <int group, int joined>
struct OpenedGroups : IntegerKind<0, group, joined> {
  static constexpr int line_inputs = 4;
  static constexpr int steps = 1;
  static constexpr bool chained = false;
  static constexpr int segment = group / line_inputs;
  static constexpr bool opened = false;
  static constexpr bool opened_groups = true;

  static constexpr int header(int) { return 0; }
  static HYBRID_INLINE Isa::I32 start(const char*, int, int) { return Isa::set_int(0); }
  static HYBRID_INLINE F32 group_scale(const char* scales, int line) { return Isa::load(floats(scales, line)); }
  static HYBRID_INLINE F32 group_minimum(const char* scales, int line) {
    return Isa::load(floats(scales, line) + kBlock);
  }
  // Scale and sum of the part of a row that the group from stored line `line` on multiplies.
  static HYBRID_INLINE RowPart row_part(const char* row, int inputs, int line) {
    const int input = line * line_inputs;
    const RowGroup& of = reinterpret_cast<const RowGroup*>(row + inputs)[input / kRowGroup];
    return {of.scale, group == kRowGroup ? of.sum : of.halves[input % kRowGroup / group]};
  }
  // A group's part of a product, scaled as its weights and as the row is, and its minimum, added to the sum.
  static HYBRID_INLINE F32 merge(F32 sum, F32 part, const OpenedScales& w, F32 row_scale, F32 row_sum) {
    return Isa::fma(row_sum, w.minimum, Isa::fma(Isa::mul(part, w.scale), row_scale, sum));
  }

 private:
  static HYBRID_INLINE const float* floats(const char* scales, int line) {
    return reinterpret_cast<const float*>(scales) + line % (kPanelInputs / line_inputs) / segment * kGroupFloats;
  }
};

// Adjacent blocks of a packed matrix from block `block` on.
struct GroupBlocks {
  GroupLayout layout;
  int inputs, part_bytes, span_bytes;
  int64_t stride;
  const char* first;

  HYBRID_INLINE GroupBlocks(GroupLayout layout, const char* matrix, int inputs, int block)
      : layout(layout),
        inputs(inputs),
        part_bytes(layout.part_bytes()),
        span_bytes(layout.span_bytes()),
        stride(layout.block_bytes(inputs)),
        first(matrix + block * stride) {}
  // From the j-th of them on.
  HYBRID_INLINE GroupBlocks behind(int j) const {
    GroupBlocks w = *this;
    w.first += j * stride;
    return w;
  }
  // What codes stand for, if there is a table: the 16 bytes four times.
  HYBRID_INLINE const char* table() const { return first; }
  // What the 256 inputs that `input` is one of have: factors, if there are any, then parts.
  HYBRID_INLINE const char* span(int input) const {
    return first + layout.table_bytes() + input / kScaleInputs * span_bytes;
  }
  // What 64 inputs from `input` on have: scales, then codes.
  HYBRID_INLINE const char* part(int input) const {
    return span(input) + layout.factor_bytes() + input % kScaleInputs / kInputs * part_bytes;
  }
};

// Of group `g` of the 64 inputs at `head`. factors: those of the 256 that they belong to.
template <GroupScales scales>
static HYBRID_INLINE OpenedScales open_scale(const char* head, const char* factors, int g, F32 offset) {
  if constexpr (scales == GroupScales::minima)
    return {Isa::from_fp16(head + g * kLine), Isa::from_fp16(head + g * kLine + kBlock * 2)};
  if constexpr (scales == GroupScales::superblocks) {
    const F32 minimum = Isa::mul(Isa::from_fp16(factors + kBlock * 2), Isa::from_int8(head + g * kBlock * 2 + kBlock));
    return {Isa::mul(Isa::from_fp16(factors), Isa::from_int8(head + g * kBlock * 2)), Isa::sub(Isa::zero(), minimum)};
  }
  if constexpr (scales == GroupScales::small_superblocks) {
    const F32 minimum = Isa::mul(Isa::from_fp16(factors + kBlock * 2), Isa::from_nibbles(head + g * kBlock, 1));
    return {Isa::mul(Isa::from_fp16(factors), Isa::from_nibbles(head + g * kBlock, 0)), Isa::sub(Isa::zero(), minimum)};
  }
  F32 scale = scales == GroupScales::tabled
                  ? Isa::load(reinterpret_cast<const float*>(factors))
                  : Isa::from_fp16(scales == GroupScales::halves ? head + g * kBlock * 2 : factors);
  if constexpr (scales != GroupScales::halves) scale = Isa::mul(scale, Isa::from_int8(head + g * kBlock));
  return {scale, Isa::mul(scale, offset)};
}

template <GroupScales scales>
static HYBRID_INLINE void open_all(const GroupBlocks& w, int block, int first, int last, float* out) {
  constexpr bool wide =
      scales == GroupScales::halves || scales == GroupScales::minima || scales == GroupScales::superblocks;
  constexpr int groups = wide ? 2 : 4;
  const char* const factors = w.span(first) + block * w.stride;
  const char* head = w.part(first) + block * w.stride;
  const F32 offset = Isa::set(-float(w.layout.offset));
  for (int input = first; input < last; input += kInputs, head += w.part_bytes) {
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g, out += kGroupFloats) {
      const OpenedScales opened = open_scale<scales>(head, factors, g, offset);
      Isa::store(out, opened.scale);
      Isa::store(out + kBlock, opened.minimum);
    }
  }
}

// Scales and minima of the groups of inputs [first, last), within 256, of `blocks` blocks, `stride` floats a block.
static HYBRID_KERNEL void open_scales(const GroupBlocks& w, int blocks, int first, int last, float* out, int stride) {
  for (int block = 0; block < blocks; ++block, out += stride) {
    switch (w.layout.scales) {
      case GroupScales::halves:
        open_all<GroupScales::halves>(w, block, first, last, out);
        break;
      case GroupScales::minima:
        open_all<GroupScales::minima>(w, block, first, last, out);
        break;
      case GroupScales::superblocks:
        open_all<GroupScales::superblocks>(w, block, first, last, out);
        break;
      case GroupScales::small_groups:
        open_all<GroupScales::small_groups>(w, block, first, last, out);
        break;
      case GroupScales::tabled:
        open_all<GroupScales::tabled>(w, block, first, last, out);
        break;
      case GroupScales::small_superblocks:
        open_all<GroupScales::small_superblocks>(w, block, first, last, out);
    }
  }
}

// Where codes of a group lie: low bits, or all of 8; what they have beyond four; and what they stand for.
template <int bits>
struct GroupCodes {
  static constexpr int extra = bits == 5 || bits == 6 ? bits - 4 : 0;
  static constexpr int low_bytes = bits == 8 ? kBlock : bits == 2 ? kBlock / 4 : kBlock / 2;  // of an input
  const char *low, *high, *table;

  // table: of a block, if it has one.
  HYBRID_INLINE GroupCodes(const char* codes, int first, const char* table)
      : low(codes + kInputs * kBlock * extra / 8 + first * low_bytes),
        high(codes + first * kBlock * extra / 8),
        table(table) {}
  HYBRID_INLINE auto operand(int64_t skip, int step) const {
    if constexpr (bits == 8)
      return Isa::load_bytes(low + skip + step * kLine);
    else if constexpr (bits == 2)
      return Isa::load_twos(low + skip + step / 4 * kLine, step % 4);
    else if constexpr (bits == kTable)
      return Isa::load_tabled(low + skip + step / 2 * kLine, step % 2, table + skip);
    else if constexpr (bits == 4)
      return Isa::load_nibbles(low + skip + step / 2 * kLine, step % 2);
    else
      return Isa::load_joined(low + skip + step / 2 * kLine, step % 2, high + skip, up(step), kMask);
  }
  HYBRID_INLINE void open(int64_t skip, int step, char* out) const {
    if constexpr (bits == 8)
      __builtin_memcpy(out, low + skip + step * kLine, kLine);
    else if constexpr (bits == 2)
      Isa::store_twos(out, low + skip + step / 4 * kLine, step % 4);
    else if constexpr (bits == kTable)
      Isa::store_tabled(out, low + skip + step / 2 * kLine, step % 2, table + skip);
    else if constexpr (bits == 4)
      Isa::store_nibbles(out, low + skip + step / 2 * kLine, step % 2);
    else
      Isa::store_joined(out, low + skip + step / 2 * kLine, step % 2, high + skip, up(step), kMask);
  }

 private:
  static constexpr int kMask = ((1 << extra) - 1) << 4;
  static HYBRID_INLINE int up(int step) { return 4 - step * extra; }  // from where the bits of a step are to bit 4
};

}  // namespace HYBRID_ISA
}  // namespace hybrid
