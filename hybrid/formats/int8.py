"""int8: symmetric, one fp32 scale per output column; made for kernels that multiply int8 activations."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import (
    BLOCK,
    K_ALIGN,
    Array,
    Bytes,
    Floats,
    all_finite,
    cut_lines,
    in_blocks,
    interleaved,
    joined,
    padded,
    padded_floats,
    round_up,
    separated,
)
from hybrid.formats.rows import RowKind

OFFSET = 128  # what is added to a code: unsigned by signed is the product that the instructions have
LARGEST = 127


class Int8:
    """A block is float32[16] scales and K / 4 lines [16 columns][4 inputs] of q + 128; w = q * scale."""

    name = "int8"
    rows: RowKind = "int8"
    integer = True
    row_group = BLOCK
    cut_inputs = K_ALIGN

    def header_bytes(self, inputs: int) -> int:
        return BLOCK * 4

    def block_bytes(self, inputs: int) -> int:
        return self.header_bytes(inputs) + inputs * BLOCK

    def pack(self, weight: Array) -> Bytes:
        rows = padded_floats(weight)
        scales = np.abs([rows.max(axis=1), rows.min(axis=1)]).max(axis=0) / np.float32(LARGEST)
        codes = rows / np.where(scales > 0, scales, 1)[:, None]
        np.rint(codes, out=codes)
        np.clip(codes, -LARGEST, LARGEST, out=codes)  # a denormal scale is too coarse to keep to the bound by itself
        codes += OFFSET
        return joined(scales.reshape(-1, BLOCK), interleaved(codes.astype(np.uint8), 4))

    def pack_blocks(self, codes: Array, scales: Floats) -> Bytes:
        """Published codes as they are: int8 [n, k], and a scale float32 [n] of each row."""
        wide = np.zeros(round_up(len(scales), BLOCK), np.float32)
        wide[: len(scales)] = scales
        return joined(wide.reshape(-1, BLOCK), interleaved(padded(codes).view(np.uint8) ^ np.uint8(OFFSET), 4))

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        inputs = round_up(k, K_ALIGN)
        blocks = in_blocks(packed, n, self.block_bytes(inputs))
        scales, lines = np.split(blocks, [self.header_bytes(inputs)], axis=1)
        codes = separated(lines.reshape(len(blocks), inputs // 4, BLOCK, 4), n, k).astype(np.float32) - OFFSET
        values: Floats = codes * np.ascontiguousarray(scales).view(np.float32).reshape(-1, 1)[:n]
        return values

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        """Every part has the scales of the whole: they are those of the columns."""
        header = self.header_bytes(inputs)
        return joined(blocks[:, :header], cut_lines(blocks, header, inputs, first, last))

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return all_finite(np.ascontiguousarray(blocks[:, : self.header_bytes(inputs)]).view(np.float32))
