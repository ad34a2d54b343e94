"""The rows that products read: bf16, or whole numbers with scales and sums, padded as packed matrices expect them."""

from __future__ import annotations

from typing import Literal

from hybrid.formats.block import K_ALIGN, LINE, round_up

# Of int8 rows there are two kinds. Those for codes in groups have a scale for as few inputs as a group has, because
# what files hold is to be computed exactly. The others have fewer, because scales cost time. Wide rows have bf16 and
# whole numbers of two bytes.
RowKind = Literal["bf16", "int8", "grouped", "wide"]

SUM_INPUTS = 32  # an int8 activation row has a sum for each so many inputs
SCALE_INPUTS = 256  # and a scale for each so many
GROUP_INPUTS = 32  # a grouped row has a scale and sums for each so many
WIDE_BASE, WIDE_TOP = 128, 10943  # of the whole numbers of a wide row: what an upper byte counts, and the largest
FP4_OFFSET = 12  # of twice the value of an fp4 code, by which sums of wide rows are multiplied


def row_stride(width: int) -> int:
    """Elements from one row of a buffer to the next: rows are padded with zeros to what packed matrices expect."""
    return round_up(width, K_ALIGN)


def int8_row_bytes(inputs: int) -> int:
    """Bytes of an int8 activation row: the padded inputs, int32 sums, float32 scales, padded to a cache line."""
    k = row_stride(inputs)
    return round_up(k + k // SUM_INPUTS * 4 + -(-k // SCALE_INPUTS) * 4, LINE)


def grouped_row_bytes(inputs: int) -> int:
    """Bytes of a grouped activation row: the padded inputs as int8, and of each group a float32 scale and the float32
    sums of what its values, and each half of them, stand for; padded to a cache line.
    """
    k = row_stride(inputs)
    return round_up(k + k // GROUP_INPUTS * 16, LINE)


def wide_row_bytes(inputs: int) -> int:
    """Bytes of a wide activation row: the padded inputs as bf16; as whole numbers, all upper bytes and all lower ones;
    two int32 sums for each 32, and a float32 scale for each 256; padded to a cache line.
    """
    k = row_stride(inputs)
    return round_up(4 * k + k // SUM_INPUTS * 8 + -(-k // SCALE_INPUTS) * 4, LINE)


def row_bytes(inputs: int, kind: RowKind) -> int:
    """Bytes from one row that a product reads to the next."""
    if kind == "bf16":
        return row_stride(inputs) * 2
    return {"int8": int8_row_bytes, "grouped": grouped_row_bytes, "wide": wide_row_bytes}[kind](inputs)


def pairs(width: int) -> int:
    """Lines in a packed block of bf16 with `width` inputs."""
    return row_stride(width) // 2
