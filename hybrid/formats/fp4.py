"""Codes of four bits (e2m1) with scales of one byte: how mxfp4 and nvfp4 are stored."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from hybrid.formats.block import BLOCK, K_ALIGN, LINE, Array, Bytes, Floats, in_blocks, round_up
from hybrid.formats.rows import RowKind

VALUES: Floats = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
LINE_INPUTS = 8
TOP = 6.0  # the largest value
_GROUPS = 4  # whose scales fill a line


class Fp4:
    """A block is `front` bytes, then by turns a line of scales, uint8 [4 groups][16 columns], and the lines of as many
    inputs, [16 columns][4 bytes]: byte b of a column in line i holds the code of input 8i + b in its low half, of input
    8i + 4 + b in its high half. Of the last groups there may be two.
    """

    name: str
    group: int  # inputs that share a scale
    front: int
    padding: int  # the scale of groups that are not there
    rows: RowKind = "wide"
    integer = False
    row_group = BLOCK

    @property
    def cut_inputs(self) -> int:
        return _GROUPS * self.group

    def header_bytes(self, inputs: int) -> int:
        """Bytes that are not lines of codes: what is in front, and the scales among the lines."""
        return self.front + -(-inputs // self.cut_inputs) * LINE

    def block_bytes(self, inputs: int) -> int:
        return self.header_bytes(inputs) + inputs * BLOCK // 2

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        body = blocks[:, self.block_bytes(first) : self.block_bytes(last)]
        return np.concatenate([blocks[:, : self.front], body], axis=1)

    def join(self, scales: Bytes, words: Array, *front: Array) -> Bytes:
        """Blocks of scales [n, ceil(k / group)] and codes as `to_words` gives them [n, ceil(k / 8)]; front: an array of
        each, [n].
        """
        n, inputs = len(words), round_up(words.shape[1] * LINE_INPUTS, K_ALIGN)
        blocks, parts = round_up(n, BLOCK) // BLOCK, -(-inputs // self.cut_inputs)
        filled = np.full((blocks * BLOCK, parts * _GROUPS), self.padding, np.uint8)
        filled[:n, : scales.shape[1]] = scales
        codes = np.zeros((blocks * BLOCK, parts * self.cut_inputs // LINE_INPUTS), np.uint32)
        codes[:n, : words.shape[1]] = words
        lines = np.ascontiguousarray(codes.reshape(blocks, BLOCK, parts, -1).transpose(0, 2, 3, 1)).view(np.uint8)
        heads = filled.reshape(blocks, BLOCK, parts, _GROUPS).transpose(0, 2, 3, 1)
        body = np.concatenate([heads.reshape(blocks, parts, -1), lines.reshape(blocks, parts, -1)], axis=2)
        body = body.reshape(blocks, -1)[:, : self.block_bytes(inputs) - self.front]
        starts = [np.pad(array, (0, len(filled) - n)).reshape(blocks, BLOCK).view(np.uint8) for array in front]
        return np.concatenate([*starts, body], axis=1)

    def split(self, packed: Array, n: int, k: int) -> tuple[Bytes, Bytes, Bytes]:
        """Codes uint8 [n, k], scales [n, ceil(k / group)], and what is in front [blocks, front], of packed blocks."""
        inputs = round_up(k, K_ALIGN)
        blocks = in_blocks(packed, n, self.block_bytes(inputs))
        scales, lines = self._parts(blocks, inputs)
        words = np.ascontiguousarray(lines).view(np.uint32).reshape(len(blocks), -1, BLOCK)
        columns = np.ascontiguousarray(words.transpose(0, 2, 1)).reshape(len(blocks) * BLOCK, -1)
        by_row = scales.reshape(len(blocks), -1, BLOCK).transpose(0, 2, 1).reshape(len(columns), -1)
        return from_words(columns)[:n, :k], by_row[:n, : -(-k // self.group)], blocks[:, : self.front]

    def scales_of(self, blocks: Bytes, inputs: int) -> Bytes:
        """All scales of packed blocks, those of padding included."""
        return self._parts(blocks, inputs)[0]

    def _parts(self, blocks: Bytes, inputs: int) -> tuple[Bytes, Bytes]:
        """Lines of scales [blocks, parts, 64] and of codes [blocks, parts, bytes], zeros where there are none."""
        parts = -(-inputs // self.cut_inputs)
        missing = self.block_bytes(parts * self.cut_inputs) - blocks.shape[1]
        filled = np.pad(blocks[:, self.front :], ((0, 0), (0, missing))) if missing else blocks[:, self.front :]
        by_part = filled.reshape(len(blocks), parts, -1)
        return by_part[..., :LINE], by_part[..., LINE:]


def to_words(codes: Bytes) -> Array:
    """Codes uint8 [n, k] as uint32 [n, ceil(k / 8)], each what a line holds of a column."""
    n, k = codes.shape
    halves = np.pad(codes, ((0, 0), (0, -k % LINE_INPUTS))).reshape(n, -1, 2, 4)
    joined: Array = np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 4).reshape(n, -1).view(np.uint32)
    return joined


def from_words(words: Array) -> Bytes:
    """The inverse of `to_words`: uint8 [n, 8 * words]."""
    stored = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 1, 4)
    return np.concatenate([stored & 15, stored >> 4], axis=2).reshape(len(words), -1)


def words_of_pairs(pairs: Bytes) -> Array:
    """The same of published codes, uint8 [n, k / 2] of two adjacent inputs a byte, the first in the low half."""
    words = np.ascontiguousarray(pairs).view("<u4")
    joined: Array = _spread(words & 0xFFFF) | _spread(words >> 16) << 4
    return joined


def _spread(words: Array) -> Array:
    """The four lowest halves of bytes in the low halves of the four bytes."""
    words = (words | words << 8) & 0x00FF00FF
    spread: Array = (words | words << 4) & 0x0F0F0F0F
    return spread


def codes_of_pairs(pairs: Bytes) -> Bytes:
    """Published codes [..., k / 2] one a byte, [..., k]."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)


def nearest(scaled: Floats) -> Bytes:
    """The nearest codes of numbers, ties to even, saturated at 6."""
    codes = _magnitudes(np.abs(scaled))
    codes |= (scaled.view(np.uint32) >> 28 & 8).astype(np.uint8)
    return codes


def _magnitudes(scaled: Floats) -> Bytes:
    """The nearest codes of numbers that are not negative, ties to even, saturated at 6.

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
