"""bf16: no scales, lines of 16 columns by two inputs."""

from __future__ import annotations

import ml_dtypes
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
    padded,
    round_up,
    separated,
)
from hybrid.formats.rows import RowKind


class Bf16:
    """A block is K / 2 lines [16 columns][2 inputs] of bf16; nothing is lost of a bf16 checkpoint."""

    name = "bf16"
    rows: RowKind = "bf16"
    integer = False
    row_group = BLOCK
    cut_inputs = K_ALIGN

    def header_bytes(self, inputs: int) -> int:
        return 0

    def block_bytes(self, inputs: int) -> int:
        return inputs * BLOCK * 2

    def pack(self, weight: Array) -> Bytes:
        bits = np.ascontiguousarray(padded(weight).astype(ml_dtypes.bfloat16, copy=False)).view(np.uint16)
        return interleaved(bits, 2).reshape(len(bits) // BLOCK, -1).view(np.uint8)

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        inputs = round_up(k, K_ALIGN)
        lines = in_blocks(packed, n, self.block_bytes(inputs)).view(ml_dtypes.bfloat16)
        values: Floats = separated(lines.reshape(len(lines), inputs // 2, BLOCK, 2), n, k).astype(np.float32)
        return values

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        return cut_lines(blocks, 0, inputs, first, last)

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return all_finite(blocks.view(np.uint16))
