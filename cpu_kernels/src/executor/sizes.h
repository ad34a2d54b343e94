// Bytes of packed blocks and of the rows that they are multiplied by: hybrid/formats/ says the same in Python.
#pragma once

#include "executor/grouped.h"
#include "executor/wide.h"

namespace hybrid {

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline bool is_integer(Format format) { return format == Format::int8 || format == Format::int4 || is_grouped(format); }

// Of a block of 16 columns, as formats/ lays it out.
inline int64_t block_bytes(Format format, int64_t inputs) {
  switch (format) {
    case Format::bf16:
      return inputs * kBlock * 2;
    case Format::int8:
      return kBlock * 4 + inputs * kBlock;
    case Format::int4:
      return inputs + inputs * kBlock / 2;
    case Format::fp8:
      return up((inputs + 127) / 128 * 4, kLine) + inputs * kBlock;
    case Format::fp8_row:
      return kBlock * 4 + inputs * kBlock;
    case Format::mxfp4:
      return kMxfp4.block_bytes(int(inputs));
    case Format::nvfp4:
      return kNvfp4.block_bytes(int(inputs));
    default:
      return group_layout(format).block_bytes(int(inputs));
  }
}

// Of an int8 activation row.
inline int64_t int8_row_bytes(int64_t inputs) {
  return inputs + inputs / kSumInputs * 4 + (inputs + kScaleInputs - 1) / kScaleInputs * 4;
}

// Of a grouped activation row.
inline int64_t grouped_row_bytes(int64_t inputs) { return inputs + inputs / kRowGroup * int64_t(sizeof(RowGroup)); }

// Of a wide activation row.
inline int64_t wide_row_bytes(int64_t inputs) { return WideOffsets(inputs).end; }

// Whether the left operand of a product is rows of bf16.
inline bool reads_bf16(Format format) { return !is_integer(format) && !is_wide(format); }

// Of the left operand of a product.
inline int64_t row_bytes(Format format, int64_t inputs) {
  if (is_grouped(format)) return grouped_row_bytes(inputs);
  if (is_wide(format)) return wide_row_bytes(inputs);
  return is_integer(format) ? int8_row_bytes(inputs) : inputs * 2;
}

}  // namespace hybrid
