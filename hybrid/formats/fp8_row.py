"""fp8_row: e4m3 with a scale for each output column, as checkpoints publish it or made from others."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import (
    BLOCK,
    K_ALIGN,
    LINE,
    Array,
    Bytes,
    Floats,
    all_finite,
    cut_lines,
    in_blocks,
    joined,
    padded,
    round_up,
)
from hybrid.formats.fp8 import LARGEST, VALUES, encode, has_nan
from hybrid.formats.rows import RowKind


class Fp8Row:
    """A block is float32[16] scales and K / 4 lines [4 inputs][16 columns] of e4m3; w = value * scale."""

    name = "fp8_row"
    rows: RowKind = "bf16"
    integer = False
    row_group = BLOCK
    cut_inputs = K_ALIGN

    def header_bytes(self, inputs: int) -> int:
        return LINE

    def block_bytes(self, inputs: int) -> int:
        return LINE + inputs * BLOCK

    def pack(self, weight: Array) -> Bytes:
        floats = weight.astype(np.float32, copy=False)
        scales = np.abs(floats).max(axis=1) / np.float32(LARGEST)
        codes = encode(np.divide(floats, np.where(scales > 0, scales, 1)[:, None], dtype=np.float32))
        return self.pack_blocks(codes, scales)

    def pack_blocks(self, values: Array, scales: Floats) -> Bytes:
        """Published values as they are: e4m3 [n, k], and float32 scales [n]."""
        codes = padded(values.view(np.uint8))
        blocks, inputs = len(codes) // BLOCK, codes.shape[1]
        header = np.zeros((blocks, BLOCK), np.float32)
        header.reshape(-1)[: len(scales)] = scales
        return joined(header, np.ascontiguousarray(codes.reshape(blocks, BLOCK, inputs).transpose(0, 2, 1)))

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        inputs = round_up(k, K_ALIGN)
        blocks = in_blocks(packed, n, self.block_bytes(inputs))
        scales = np.ascontiguousarray(blocks[:, :LINE]).view(np.float32).reshape(-1)
        codes = blocks[:, LINE:].reshape(len(blocks), inputs, BLOCK).transpose(0, 2, 1).reshape(-1, inputs)
        return decode(codes[:n, :k], scales[:n])

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        return joined(blocks[:, :LINE], cut_lines(blocks, LINE, inputs, first, last))

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        header = np.ascontiguousarray(blocks[:, :LINE]).view(np.float32)
        return all_finite(header) and not has_nan(blocks[:, LINE:])


def decode(codes: Bytes, scales: Floats) -> Floats:
    """e4m3 codes [n, k] times the scales of their rows [n], as float32."""
    values: Floats = np.take(VALUES, codes.view(np.uint8)) * scales[:, None]
    return values
