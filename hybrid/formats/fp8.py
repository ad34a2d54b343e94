"""fp8: e4m3 with a scale for each 128 by 128 values, as checkpoints publish it or made from others."""

from __future__ import annotations

import ml_dtypes
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
from hybrid.formats.rows import RowKind

SQUARE = 128  # rows and inputs that share a scale
LARGEST = 448.0
VALUES: Floats = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_NAN = 0x7F  # all bits but the sign
_TILE = 4 * SQUARE  # inputs quantised at a time: intermediates this small stay in the cache and are never given back
_STEPPER, _SMALLEST_NORMAL = np.float32(2.0**14), np.float32(2.0**-6)


class Fp8:
    """A block is float32[ceil(K / 128)] scales, padded to whole lines, and K / 4 lines [4 inputs][16 columns] of e4m3.

    w = value * scale, the same scale for the 16 columns.
    """

    name = "fp8"
    rows: RowKind = "bf16"
    integer = False
    row_group = SQUARE
    cut_inputs = SQUARE

    def header_bytes(self, inputs: int) -> int:
        return round_up(-(-inputs // SQUARE) * 4, LINE)

    def block_bytes(self, inputs: int) -> int:
        return self.header_bytes(inputs) + inputs * BLOCK

    def pack(self, weight: Array) -> Bytes:
        pieces = [quantise(weight[:, first : first + _TILE]) for first in range(0, weight.shape[1], _TILE)]
        codes, scales = (np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True))
        return self.pack_blocks(codes, scales, 0)

    def pack_blocks(self, values: Array, scales: Floats, first_row: int) -> Bytes:
        """Published values as they are: e4m3 [n, k], rows `first_row` and on of a matrix with scales
        [rows / 128, ceil(k / 128)]. first_row is a multiple of 16, so that a block has one row of scales.
        """
        codes = padded(values.view(np.uint8))
        blocks, inputs = len(codes) // BLOCK, codes.shape[1]
        header = np.zeros((blocks, self.header_bytes(inputs) // 4), np.float32)
        header[:, : scales.shape[1]] = scales[(first_row + BLOCK * np.arange(blocks)) // SQUARE]
        return joined(header, np.ascontiguousarray(codes.reshape(blocks, BLOCK, inputs).transpose(0, 2, 1)))

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        inputs = round_up(k, K_ALIGN)
        blocks = in_blocks(packed, n, self.block_bytes(inputs))
        header, lines = np.split(blocks, [self.header_bytes(inputs)], axis=1)
        scales = np.ascontiguousarray(header).view(np.float32).repeat(SQUARE, axis=1)[:, None, :inputs]
        codes = lines.reshape(len(blocks), inputs, BLOCK).transpose(0, 2, 1)
        values: Floats = (VALUES[codes] * scales).reshape(-1, inputs)[:n, :k]
        return np.ascontiguousarray(values)

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        header = np.zeros((len(blocks), self.header_bytes(last - first)), np.uint8)
        scales = blocks[:, first // SQUARE * 4 : -(-last // SQUARE) * 4]
        header[:, : scales.shape[1]] = scales
        return joined(header, cut_lines(blocks, self.header_bytes(inputs), inputs, first, last))

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        header = np.ascontiguousarray(blocks[:, : self.header_bytes(inputs)]).view(np.float32)
        return all_finite(header) and not has_nan(blocks[:, self.header_bytes(inputs) :])


def has_nan(codes: Bytes) -> bool:
    """Whether any e4m3 code is a NaN; the format has no infinity."""
    # As signed bytes the positive one is the largest, as unsigned bytes the negative one: two passes without a copy.
    return codes.size > 0 and bool(codes.view(np.int8).max() == _NAN or codes.max() == (_NAN | 0x80))


def decode(codes: Bytes, scales: Floats) -> Floats:
    """e4m3 codes [n, k] times the scales of their rows [n, ceil(k / 128)], as float32."""
    values: Floats = np.take(VALUES, codes)
    for square in range(scales.shape[1]):
        values[:, square * SQUARE : (square + 1) * SQUARE] *= scales[:, square, None]
    return values


def quantise(weight: Array) -> tuple[Bytes, Floats]:
    """Codes [n, k], and the largest magnitude / 448 of every 128 by 128 values [ceil(n / 128), ceil(k / 128)]."""
    n, k = weight.shape
    squares = _in_squares(weight)
    scales = np.abs(squares).max(axis=1).max(axis=-1) / np.float32(LARGEST)
    divisors = np.where(scales > 0, scales, 1)[:, None, :, None]
    codes = encode(np.divide(squares, divisors, dtype=np.float32))
    return codes.reshape(-1, scales.shape[1] * SQUARE)[:n, :k], scales


def encode(values: Floats) -> Bytes:
    """The nearest e4m3 codes, ties to even; beyond 448 saturated, so never a NaN.

    The bits are put together from those of float32, which is many times faster than a cast element by element.
    """
    magnitudes = np.clip(np.abs(values), 0, np.float32(LARGEST))
    # From 2^-6 on: 3 bits behind the point, ties to even, and exponents biased by 7 instead of 127.
    codes = np.maximum(magnitudes, _SMALLEST_NORMAL).view(np.int32)
    codes += (codes >> 20 & 1) + ((1 << 19) - 1 - (120 << 23))
    codes >>= 20
    # Below, steps are 2^-9: the sum with 2^14 is rounded to just that, and its lowest bits count the steps. Above,
    # this count is at least the code, below at most the code of 2^-6: the smaller one is right, without a branch.
    magnitudes += _STEPPER
    np.minimum(codes, magnitudes.view(np.int32) - _STEPPER.view(np.int32), out=codes)
    codes |= values.view(np.int32) >> 24 & 0x80
    found: Bytes = codes.astype(np.uint8)
    return found


def _in_squares(weight: Array) -> Floats:
    """[n, k] as float32 [rows / 128, 128, columns / 128, 128], filled up with zeros."""
    n, k = (round_up(size, SQUARE) for size in weight.shape)
    filled = np.pad(weight, ((0, n - weight.shape[0]), (0, k - weight.shape[1])))
    return filled.astype(np.float32, copy=False).reshape(n // SQUARE, SQUARE, k // SQUARE, SQUARE)
