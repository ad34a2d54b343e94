"""The rows that products read: bf16, or int8 with scales and sums, padded as packed matrices expect them."""

from __future__ import annotations

from typing import Literal

from hybrid.formats.block import K_ALIGN, LINE, round_up

# Of int8 rows there are two kinds. Those for codes in groups have a scale for as few inputs as a group has, because
# what files hold is to be computed exactly. The others have fewer, because scales cost time.
RowKind = Literal["bf16", "int8", "grouped"]

SUM_INPUTS = 32  # an int8 activation row has a sum for each so many inputs
SCALE_INPUTS = 256  # and a scale for each so many
GROUP_INPUTS = 32  # a grouped row has a scale and a sum for each so many


def row_stride(width: int) -> int:
    """Elements from one row of a buffer to the next: rows are padded with zeros to what packed matrices expect."""
    return round_up(width, K_ALIGN)


def int8_row_bytes(inputs: int) -> int:
    """Bytes of an int8 activation row: the padded inputs, int32 sums, float32 scales, padded to a cache line."""
    k = row_stride(inputs)
    return round_up(k + k // SUM_INPUTS * 4 + -(-k // SCALE_INPUTS) * 4, LINE)


def grouped_row_bytes(inputs: int) -> int:
    """Bytes of a grouped activation row: the padded inputs as int8, and of each group a float32 scale and the float32
    sum of what its values stand for; padded to a cache line.
    """
    k = row_stride(inputs)
    return round_up(k + k // GROUP_INPUTS * 8, LINE)


def row_bytes(inputs: int, kind: RowKind) -> int:
    """Bytes from one row that a product reads to the next."""
    if kind == "bf16":
        return row_stride(inputs) * 2
    return int8_row_bytes(inputs) if kind == "int8" else grouped_row_bytes(inputs)


def pairs(width: int) -> int:
    """Lines in a packed block of bf16 with `width` inputs."""
    return row_stride(width) // 2
