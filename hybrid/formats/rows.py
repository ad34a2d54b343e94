"""The rows that products read: bf16, or int8 with sums and scales, padded as packed matrices expect them."""

from __future__ import annotations

from hybrid.formats.block import K_ALIGN, round_up

SUM_INPUTS = 32  # an int8 activation row has a sum for each so many inputs
SCALE_INPUTS = 256  # and a scale for each so many


def row_stride(width: int) -> int:
    """Elements from one row of a buffer to the next: rows are padded with zeros to what packed matrices expect."""
    return round_up(width, K_ALIGN)


def int8_row_bytes(inputs: int) -> int:
    """Bytes of an int8 activation row: the padded inputs, int32 sums, float32 scales, padded to a cache line."""
    k = row_stride(inputs)
    return round_up(k + k // SUM_INPUTS * 4 + -(-k // SCALE_INPUTS) * 4, 64)


def row_bytes(inputs: int, integer: bool) -> int:
    """Bytes from one row that a product reads to the next: int8 with sums and scales, or bf16."""
    return int8_row_bytes(inputs) if integer else row_stride(inputs) * 2


def pairs(width: int) -> int:
    """Lines in a packed block of bf16 with `width` inputs."""
    return row_stride(width) // 2
