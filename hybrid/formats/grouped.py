"""Codes of 2, 4, 5, 6 or 8 bits in groups of inputs that share a scale and perhaps a minimum, as GGUF files hold them.

What a format's scales are is in `halves.py`, `superblocks.py` and `tabled.py`; where codes and lines of scales lie is
the same in all of them. Published codes and scales are packed as they are, without arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybrid.formats.block import BLOCK, K_ALIGN, LINE, Array, Bytes, Floats, in_blocks, round_up
from hybrid.formats.rows import RowKind

_LOW, _FOUR = 0x0F0F_0F0F, 0x0101_0101  # four codes are handled as one word
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Grouped(ABC):
    """A block is a table, if its format has one, and spans of inputs: a line of factors, if there are any, and for each
    64 inputs lines of scales, lines of high bits and lines of low bits.

    Codes of 4 bits and the low 4 of longer ones lie as in int4: byte b of a column in line i has those of input 8i + b
    and, in its high half, of input 8i + 4 + b. High bits: byte b of a column has, from its lowest bits on, those of
    inputs b, 4 + b, 8 + b and so on. Codes of 2 bits lie as high bits do, those of 8 bits as in int8.

    offset: what is taken off a code before it is multiplied.
    """

    name: str
    bits: int
    offset: int = 0

    rows: ClassVar[RowKind] = "grouped"
    integer: ClassVar[bool] = True
    row_group: ClassVar[int] = BLOCK
    span: ClassVar[int] = K_ALIGN  # inputs that share factors
    factor_lines: ClassVar[int] = 0  # of `span` inputs
    table_lines: ClassVar[int] = 0  # of a block

    @property
    @abstractmethod
    def head_lines(self) -> int:
        """Lines of scales before the codes of 64 inputs."""

    @property
    def cut_inputs(self) -> int:
        return self.span

    @property
    def part_bytes(self) -> int:
        """Bytes of 64 inputs: scales and codes."""
        return self.head_lines * LINE + K_ALIGN * BLOCK * self.bits // 8

    def header_bytes(self, inputs: int) -> int:
        return (self.table_lines + -(-inputs // self.span) * self.factor_lines) * LINE

    def block_bytes(self, inputs: int) -> int:
        return self.header_bytes(inputs) + inputs // K_ALIGN * self.part_bytes

    def pack(self, weight: Array) -> Bytes:
        """Rounded to the nearest codes. Raises `ValueError` for weights beyond the range of the scales."""
        return self.pack_blocks(*self.quantise(weight))

    @abstractmethod
    def quantise(self, weight: Array) -> tuple[Array, ...]:
        """Codes [n, k] and scales as `pack_blocks` takes them."""

    def pack_blocks(self, codes: Array, *scales: Array) -> Bytes:
        """Published codes [n, k] of one byte each, and scales [n, groups], as they are."""
        header, heads = self._heads(codes.shape, *scales)
        parts = np.concatenate([heads, _lines(codes, self.bits, self.offset)], axis=2)
        return self._join(header.view(np.uint8), parts.reshape(*parts.shape[:2], -1).view(np.uint8))

    @abstractmethod
    def decode(self, codes: Array, *scales: Array) -> Floats:
        """What published codes and scales stand for: float32 [n, k]."""

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        inputs = round_up(k, K_ALIGN)
        blocks = in_blocks(packed, n, self.block_bytes(inputs))
        header, heads, lines = self._split(blocks, inputs)
        found = self.decode(_codes(lines, self.bits), *self._scales(header, heads))
        return np.ascontiguousarray(found[:n, :k])

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        spans = blocks[:, self.block_bytes(first) : self.block_bytes(last)]
        return np.concatenate([blocks[:, : self.block_bytes(0)], spans], axis=1) if self.table_lines else spans

    @abstractmethod
    def all_finite(self, blocks: Bytes, inputs: int) -> bool: ...

    def _join(self, header: Bytes, parts: Bytes) -> Bytes:
        """Blocks of headers [blocks, factors and then a table] and parts [blocks, K / 64, part_bytes]."""
        factors, table = np.split(header, [header.shape[1] - self.table_lines * LINE], axis=1)
        spans = _gathered(parts, self.span // K_ALIGN)
        lines = factors.reshape(*spans.shape[:2], self.factor_lines * LINE)
        body = np.concatenate([lines, spans], axis=2).reshape(len(parts), -1)
        return np.concatenate([table, body], axis=1)[:, : self.block_bytes(parts.shape[1] * K_ALIGN)]

    def _split(self, blocks: Bytes, inputs: int) -> tuple[Bytes, Bytes, Bytes]:
        """Headers as `_join` takes them; lines of scales and lines of codes, both [blocks, K / 64, bytes]."""
        parts = self._spans(blocks)[:, :, self.factor_lines * LINE :].reshape(len(blocks), -1, self.part_bytes)
        heads, lines = np.split(parts[:, : inputs // K_ALIGN], [self.head_lines * LINE], axis=2)
        header = np.concatenate([self._factors(blocks), blocks[:, : self.table_lines * LINE]], axis=1)
        return header, np.ascontiguousarray(heads), np.ascontiguousarray(lines)

    def _factors(self, blocks: Bytes) -> Bytes:
        """[blocks, bytes]"""
        spans = self._spans(blocks)
        return spans[:, :, : self.factor_lines * LINE].reshape(len(blocks), spans.shape[1] * self.factor_lines * LINE)

    def _spans(self, blocks: Bytes) -> Bytes:
        """[blocks, spans, bytes], of which the last is filled up with zeros."""
        span_bytes = self.factor_lines * LINE + self.span // K_ALIGN * self.part_bytes
        return _gathered(blocks[:, self.table_lines * LINE :, None], span_bytes)

    @abstractmethod
    def _heads(self, shape: tuple[int, ...], *scales: Array) -> tuple[Array, Array]:
        """Headers [blocks, words], factors before a table, and lines of scales [blocks, K / 64, lines, 16] of words."""

    @abstractmethod
    def _scales(self, header: Bytes, heads: Bytes) -> tuple[Array, ...]:
        """The inverse of `_heads`, of padded rows and groups."""


def exact_halves(scales: Array) -> Array:
    """The same numbers in fp16. Raises `ValueError` where fp16 does not hold one exactly."""
    with np.errstate(over="ignore"):
        halves: Array = scales.astype(np.float16)
    wrong = halves.astype(np.float32) != scales.astype(np.float32)
    if wrong.any():
        raise ValueError(f"a scale is {float(scales[wrong][0])!r}, which fp16 does not hold exactly")
    return halves


def to_halves(scales: Floats) -> Array:
    """The nearest numbers in fp16. Raises `ValueError` beyond its range."""
    if scales.size and not np.abs(scales).max() <= LARGEST_HALF:
        raise ValueError(f"a scale would be {float(np.abs(scales).max()):.3g}; fp16 holds {LARGEST_HALF:.0f} at most")
    return scales.astype(np.float16)


def _gathered(items: Bytes, count: int) -> Bytes:
    """[blocks, ceil(items / count), count * bytes] of [blocks, items, bytes], filled up with zeros."""
    missing = -items.shape[1] % count
    filled = np.pad(items, ((0, 0), (0, missing), (0, 0))) if missing else items
    return filled.reshape(len(items), filled.shape[1] // count, -1)


def by_column(groups: Array, inputs: int, group: int) -> Array:
    """[n, ceil(k / group)] as [blocks, inputs / group, 16], filled up with zeros."""
    n, count = groups.shape
    missing = ((0, round_up(n, BLOCK) - n), (0, -(-inputs // group) - count))
    filled = np.pad(groups, missing)
    return np.ascontiguousarray(filled.reshape(-1, BLOCK, filled.shape[1]).transpose(0, 2, 1))


def by_row(columns: Array) -> Array:
    """The inverse of `by_column`: [n, groups] of [blocks, groups, 16]."""
    return np.ascontiguousarray(columns.transpose(0, 2, 1).reshape(-1, columns.shape[1]))


def spread(scales: Array, k: int, group: int) -> Floats:
    """Scales [n, groups] as float32 [n, k], each as often as its group has inputs."""
    wide: Floats = np.repeat(scales.astype(np.float32), group, axis=1)[:, :k]
    return wide


def in_groups(weight: Array, group: int) -> Floats:
    """[n, k] as float32 [n, ceil(k / group), group], filled up with zeros."""
    n, k = weight.shape
    filled = np.pad(weight, ((0, 0), (0, round_up(k, group) - k))).astype(np.float32, copy=False)
    return filled.reshape(n, -1, group)


def nearest(values: Floats, scales: Floats, low: int, high: int) -> Array:
    """Codes [n, groups * size] of values [n, groups, size] that are to be multiplied by scales [n, groups]."""
    codes = values / np.where(scales == 0, 1, scales)[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, low, high, out=codes)
    return codes.reshape(len(codes), -1)


def extremes(values: Floats) -> Floats:
    """The value of largest magnitude of each group: [n, groups] of [n, groups, size]."""
    high, low = values.max(axis=-1), values.min(axis=-1)
    largest: Floats = np.where(high > -low, high, low)
    return largest


def _lines(codes: Array, bits: int, offset: int) -> Array:
    """Lines of codes of each 64 inputs: uint32 [blocks, K / 64, lines, 16]. Inputs and columns beyond are zeros."""
    n, k = codes.shape
    missing = ((0, round_up(n, BLOCK) - n), (0, round_up(k, K_ALIGN) - k))
    filled = np.pad(codes.view(np.uint8), missing, constant_values=0 if bits == 8 else offset)
    words, parts = np.ascontiguousarray(filled).view(np.uint32), filled.shape[1] // K_ALIGN
    if bits == 8:
        return _by_part(words ^ 0x8080_8080, parts)
    if bits == 2:
        return _by_part(_high_words(words, bits, 0), parts)
    pairs = words.reshape(len(words), -1, 2) & _LOW
    low = _by_part(pairs[..., 0] | pairs[..., 1] << 4, parts)
    return low if bits == 4 else np.concatenate([_by_part(_high_words(words, bits - 4), parts), low], axis=2)


def _codes(lines: Bytes, bits: int) -> Array:
    """The inverse of `_lines`: [n, k] of padded rows and inputs, int8 where codes have 8 bits."""
    words = lines.view(np.uint32).reshape(*lines.shape[:2], -1, BLOCK)
    if bits == 8:
        return (_by_rows(words) ^ 0x8080_8080).view(np.int8)
    if bits == 2:
        return _spread_words(_by_rows(words), bits).view(np.uint8)
    high, low = np.split(words, [words.shape[2] - 8], axis=2)
    pairs = _by_rows(low)
    codes = np.stack([pairs & _LOW, pairs >> 4 & _LOW], axis=-1).reshape(len(pairs), -1)
    if bits > 4:
        codes |= _spread_words(_by_rows(high), bits - 4) << 4
    return codes.view(np.uint8)


def _spread_words(words: Array, extra: int) -> Array:
    """The inverse of `_high_words`, in the lowest bits: uint32 [n, words * 8 / extra]."""
    shifts = np.arange(0, 8, extra, dtype=np.uint32)
    found: Array = words[..., None] >> shifts & _FOUR * ((1 << extra) - 1)
    return found.reshape(len(words), -1)


def _high_words(words: Array, extra: int, low: int = 4) -> Array:
    """What is above the `low` bits of codes, 8 / extra words in one."""
    several = words.reshape(len(words), -1, 8 // extra) >> low & _FOUR * ((1 << extra) - 1)
    found = several[..., 0].copy()
    for step in range(1, 8 // extra):
        found |= several[..., step] << extra * step
    return found


def _by_part(words: Array, parts: int) -> Array:
    """uint32 [n, words] as [blocks, parts, words of a part, 16]."""
    blocks = len(words) // BLOCK
    columns = words.reshape(blocks, BLOCK, words.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(columns).reshape(blocks, parts, -1, BLOCK)


def _by_rows(words: Array) -> Array:
    """The inverse of `_by_part`."""
    return np.ascontiguousarray(words.transpose(0, 3, 1, 2)).reshape(len(words) * BLOCK, -1)
