"""Codes of four bits that a table turns into numbers: what GGUF's types of one to four bits have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybrid.formats.block import BLOCK, K_ALIGN, LINE, Array, Bytes, Floats, all_finite, round_up
from hybrid.formats.grouped import by_column, by_row, extremes, in_groups, nearest, spread
from hybrid.formats.superblocks import SMALL, SPAN, Superblocks

NUMBERS = 16  # of a table
# With the least mean square error on normally distributed weights, of those with 0 whose largest number is -127.
NORMAL = np.array([-127, -100, -78, -59, -43, -28, -14, 0, 11, 23, 35, 48, 61, 77, 94, 114], np.int8)


@dataclass(frozen=True)
class Tabled(Superblocks):
    """w = table[q] * (d * scale); the signed scales of 64 inputs are a line, int8 [4 groups of 16 inputs][16].

    In front of a block is a line with the 16 numbers of its table, as in int8, four times, and each 256 inputs begin
    with a line, fp32 [16 factors]. offset: the code of inputs that are not there.
    """

    table_lines: ClassVar[int] = 1

    def quantise(self, weight: Array) -> tuple[Array, ...]:
        values, k = in_groups(weight, SPAN), weight.shape[1]
        groups = values.reshape(len(values), -1, SMALL)
        wanted = extremes(groups) / np.float32(NORMAL[0])
        by_span = wanted.reshape(*values.shape[:2], -1)
        d = extremes(by_span) / np.float32(-128) + np.float32(0)
        scales = nearest(by_span, d, -128, 127)
        widths = spread(d, groups.shape[1], SPAN // SMALL) * scales
        numbers = groups / np.where(widths == 0, 1, widths)[..., None]
        between = (NORMAL[1:].astype(np.float32) + NORMAL[:-1]) / 2
        codes = np.searchsorted(between, numbers).reshape(len(values), -1)[:, :k].astype(np.uint8)
        tables = np.broadcast_to(NORMAL, (round_up(len(codes), BLOCK) // BLOCK, NUMBERS))
        return codes, d, scales[:, : -(-k // SMALL)].astype(np.int8), tables

    def decode(self, codes: Array, *scales: Array) -> Floats:
        """codes: uint8; d: fp32 [n, ceil(k / 256)]; scales: int8 [n, ceil(k / 16)]; tables: int8 [ceil(n / 16), 16]."""
        d, widths = (spread(array, codes.shape[1], size) for array, size in zip(scales[:2], (SPAN, SMALL), strict=True))
        values: Floats = d * widths * looked_up(codes, scales[2])
        return values

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return all_finite(self._factors(blocks).view(np.float32))

    def _heads(self, shape: tuple[int, ...], *scales: Array) -> tuple[Array, Array]:
        inputs = round_up(shape[1], K_ALIGN)
        d, widths = (by_column(array, inputs, size) for array, size in zip(scales[:2], (SPAN, SMALL), strict=True))
        factors = d.astype(np.float32, copy=False).reshape(len(d), -1).view(np.uint8)
        tables = np.tile(scales[2].view(np.uint8) ^ 0x80, LINE // NUMBERS)
        heads = widths.astype(np.int8, copy=False).reshape(len(widths), -1, 4 * BLOCK)
        return np.concatenate([factors, tables], axis=1), heads.view(np.uint32)[:, :, None]

    def _scales(self, header: Bytes, heads: Bytes) -> tuple[Array, ...]:
        factors, tables = np.split(header, [header.shape[1] - LINE], axis=1)
        return (
            by_row(np.ascontiguousarray(factors).view(np.float32).reshape(len(header), -1, BLOCK)),
            by_row(heads.view(np.int8).reshape(len(heads), -1, BLOCK)),
            (tables[:, :NUMBERS] ^ 0x80).view(np.int8),
        )


def looked_up(codes: Array, tables: Array) -> Array:
    """What codes [n, k] stand for in the tables of their blocks [ceil(n / 16), 16]: int8 [n, k]."""
    found: Array = np.take_along_axis(np.repeat(tables, BLOCK, axis=0)[: len(codes)], codes.astype(np.intp), axis=1)
    return found
