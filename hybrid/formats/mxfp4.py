"""mxfp4: e2m1 with a power of two for each 32 inputs, as checkpoints publish it or made from others."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import (
    BLOCK,
    GROUP,
    K_ALIGN,
    LINE,
    Array,
    Bytes,
    Floats,
    by_group,
    cut_lines,
    from_groups,
    in_blocks,
    joined,
    round_up,
)
from hybrid.formats.rows import RowKind

VALUES: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BIAS = 127
LARGEST_EXPONENT = 125  # 6 * 2^126 is more than float32 holds
HIGHEST = BIAS + LARGEST_EXPONENT  # above come infinite weights, and the exponent that stands for no number
_TOP = 2  # exponent of the largest e2m1 value, 6 = 1.5 * 2^2


class Mxfp4:
    """A block is uint8 [K / 32][16] exponents, padded to whole lines, and K / 8 lines [4 pairs][16 columns].

    A byte holds the codes of inputs 8i + 2p (low half) and 8i + 2p + 1; w = value * 2^(exponent - 127).
    """

    name = "mxfp4"
    rows: RowKind = "bf16"
    integer = False
    row_group = BLOCK
    cut_inputs = K_ALIGN

    def header_bytes(self, inputs: int) -> int:
        return round_up(inputs // GROUP * BLOCK, LINE)

    def block_bytes(self, inputs: int) -> int:
        return self.header_bytes(inputs) + inputs * BLOCK // 2

    def pack(self, weight: Array) -> Bytes:
        values = by_group(weight)
        exponents, codes = quantise(values)
        pairs = codes.reshape(4, 4, 2, *values.shape[1:])
        lines = pairs[:, :, 0] | pairs[:, :, 1] << 4
        # moved as the sixteen bytes of a group of columns, which is several times faster than byte by byte
        columns = lines.view("V16")[..., 0]
        return self._join(exponents, np.ascontiguousarray(columns.transpose(2, 3, 0, 1)).view(np.uint8))

    def pack_blocks(self, blocks: Bytes, scales: Bytes) -> Bytes:
        """Published blocks as they are: uint8 [n, groups, 16] of two codes a byte, and exponents [n, groups]."""
        n, groups = scales.shape
        missing = ((0, round_up(n, BLOCK) - n), (0, round_up(groups, K_ALIGN // GROUP) - groups))
        exponents = np.pad(scales, missing, constant_values=BIAS)
        codes = np.pad(blocks, (*missing, (0, 0))).reshape(-1, BLOCK, exponents.shape[1], 16)
        header = exponents.reshape(-1, BLOCK, exponents.shape[1]).transpose(0, 2, 1)
        return self._join(header, np.ascontiguousarray(codes.transpose(0, 2, 3, 1)))

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        inputs = round_up(k, K_ALIGN)
        blocks = in_blocks(packed, n, self.block_bytes(inputs))
        header, body = np.split(blocks, [self.header_bytes(inputs)], axis=1)
        lines = body.reshape(len(blocks), inputs // GROUP, 16, BLOCK).transpose(2, 0, 1, 3)
        codes = np.stack([lines & 15, lines >> 4], axis=1).reshape(GROUP, *lines.shape[1:])
        exponents = header[:, : inputs // GROUP * BLOCK].reshape(lines.shape[1:])
        return from_groups(VALUES[codes] * powers(exponents), n, k)

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        header = np.full((len(blocks), self.header_bytes(last - first)), BIAS, np.uint8)
        exponents = blocks[:, first // GROUP * BLOCK : last // GROUP * BLOCK]
        header[:, : exponents.shape[1]] = exponents
        return joined(header, cut_lines(blocks, self.header_bytes(inputs), inputs, first, last))

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return not (blocks[:, : self.header_bytes(inputs)] > HIGHEST).any()

    def _join(self, exponents: Bytes, lines: Bytes) -> Bytes:
        """Blocks of exponents [blocks, K / 32, 16] and lines [blocks, ...]."""
        inputs = exponents.shape[1] * GROUP
        header = np.full((len(lines), self.header_bytes(inputs)), BIAS, np.uint8)
        header[:, : inputs // GROUP * BLOCK] = exponents.reshape(len(lines), -1)
        return joined(header, lines)


def powers(exponents: Bytes) -> Floats:
    """2^(exponent - 127), exactly."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS)


def decode(blocks: Bytes, scales: Bytes) -> Floats:
    """Published blocks [n, groups, 16] and exponents [n, groups] as float32 [n, groups * 32]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, GROUP)
    values: Floats = np.take(VALUES, codes) * powers(scales)[..., None]
    return values.reshape(len(scales), -1)


@np.errstate(over="ignore")  # squares of values above 1e19: no error then is the smaller one
def quantise(values: Floats) -> tuple[Bytes, Bytes]:
    """Exponents [...] and codes [32, ...] of groups of values [32, ...].

    The largest value's own exponent saturates it when it is above 6 / 8 of the next power; the next exponent does
    not, but is coarser: whichever has the smaller squared error is taken.
    """
    largest = np.maximum(values.max(axis=0), -values.min(axis=0))
    exponents = np.frexp(largest)[1] - 1 - _TOP  # frexp is a fraction in [0.5, 1), one more than the exponent
    exponents = np.where(largest == 0, 0, np.clip(exponents, -BIAS, LARGEST_EXPONENT - 1))
    exponents += _errors(values, exponents + 1) < _errors(values, exponents)
    codes = _magnitudes(np.abs(values) * np.ldexp(np.float32(1), -exponents))
    codes |= (values.view(np.uint32) >> 28 & 8).astype(np.uint8)
    return (exponents + BIAS).astype(np.uint8), codes


def _errors(values: Floats, exponents: Array) -> Floats:
    """The squared error of each group with one choice of exponents."""
    scaled = np.abs(values)
    scaled *= np.ldexp(np.float32(1), -exponents)
    scaled -= np.take(VALUES, _magnitudes(scaled))
    scaled *= scaled
    errors: Floats = np.ldexp(scaled.sum(axis=0), 2 * exponents)
    return errors


def _magnitudes(scaled: Floats) -> Bytes:
    """The nearest e2m1 codes of numbers that are not negative, ties to even, saturated at 6.

    There is one line for each of the steps 0.5, 1 and 2, and where a coarser step begins, its line is the lowest.
    """
    codes = np.rint(scaled + scaled)
    step = np.rint(scaled)
    step += 2
    np.minimum(codes, step, out=codes)
    np.multiply(scaled, np.float32(0.5), out=step)
    np.rint(step, out=step)
    step += 4
    np.minimum(codes, step, out=codes)
    found: Bytes = np.clip(codes, 0, 7, out=codes).astype(np.uint8)
    return found
