"""Superblocks of 256 inputs, whose groups have small whole numbers for scales: GGUF's Q2_K, Q4_K, Q5_K and Q6_K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybrid.formats.block import BLOCK, GROUP, K_ALIGN, Array, Bytes, Floats, all_finite, round_up
from hybrid.formats.grouped import Grouped, by_column, by_row, extremes, in_groups, nearest, spread, to_halves

SPAN = 256  # inputs of a superblock
SMALL = 16  # inputs of a group of q6_k and q2_k


@dataclass(frozen=True)
class Superblocks(Grouped):
    """Each 256 inputs begin with a line, fp16 [16 factors of scales][16 factors of minima]."""

    span: ClassVar[int] = SPAN
    factor_lines: ClassVar[int] = 1

    @property
    def head_lines(self) -> int:
        return 1

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return all_finite(self._factors(blocks).view(np.float16))


@dataclass(frozen=True)
class ScaledAndLowered(Superblocks):
    """w = q * (d * scale) - dmin * minimum; the scales and minima, whole numbers of 6 bits, of 64 inputs are a line,
    uint8 [2 groups][16 scales][16 minima].
    """

    group: ClassVar[int] = GROUP
    highest: ClassVar[int] = 63  # of scales and minima

    def quantise(self, weight: Array) -> tuple[Array, ...]:
        values, highest, k = in_groups(weight, SPAN), (1 << self.bits) - 1, weight.shape[1]
        groups = values.reshape(len(values), -1, self.group)
        lowered = np.maximum(-groups.min(axis=-1), 0)
        widths = np.maximum(groups.max(axis=-1) + lowered, 0) / np.float32(highest)
        (d, scales), (dmin, minima) = self._whole(widths), self._whole(lowered)
        offset = spread(dmin, groups.shape[1], SPAN // self.group) * minima
        width = spread(d, groups.shape[1], SPAN // self.group) * scales
        codes = nearest(groups + offset[..., None], width, 0, highest)[:, :k].astype(np.uint8)
        count = -(-k // self.group)
        return codes, d, dmin, scales[:, :count], minima[:, :count]

    def decode(self, codes: Array, *scales: Array) -> Floats:
        """codes: uint8; d, dmin: fp16 [n, ceil(k / 256)]; scales, minima: uint8 [n, ceil(k / group)]."""
        d, dmin, widths, minima = (
            spread(array, codes.shape[1], size) for array, size in zip(scales, self._sizes(), strict=True)
        )
        values: Floats = d * widths * codes - dmin * minima
        return values

    def _heads(self, shape: tuple[int, ...], *scales: Array) -> tuple[Array, Array]:
        inputs = round_up(shape[1], K_ALIGN)
        d, dmin, widths, minima = (
            by_column(array, inputs, size) for array, size in zip(scales, self._sizes(), strict=True)
        )
        header = np.stack([d, dmin], axis=2).astype(np.float16, copy=False)
        heads = self._joined(widths, minima).astype(np.uint8, copy=False)
        return header.reshape(len(header), -1), heads.reshape(len(heads), -1, 4 * BLOCK).view(np.uint32)[:, :, None]

    def _scales(self, header: Bytes, heads: Bytes) -> tuple[Array, ...]:
        factors = header.view(np.float16).reshape(len(header), -1, 2, BLOCK)
        groups = self._parted(heads.reshape(len(heads), -1, BLOCK))
        return tuple(map(by_row, (factors[:, :, 0], factors[:, :, 1], *groups)))

    def _joined(self, scales: Array, minima: Array) -> Array:
        """Those of groups [blocks, groups, 16] as the lines have them, and `_parted` the inverse."""
        return np.stack([scales, minima], axis=2)

    def _parted(self, groups: Array) -> tuple[Array, Array]:
        return groups[:, 0::2], groups[:, 1::2]

    def _sizes(self) -> tuple[int, ...]:
        """Inputs of what it has."""
        return SPAN, SPAN, self.group, self.group

    def _whole(self, wanted: Floats) -> tuple[Array, Array]:
        """Factors fp16 [n, spans] and whole numbers whose products are near what is wanted [n, groups]."""
        by_span = wanted.reshape(len(wanted), -1, SPAN // self.group)
        factors = to_halves(by_span.max(axis=-1) / np.float32(self.highest))
        return factors, nearest(by_span, factors.astype(np.float32), 0, self.highest).astype(np.uint8)


@dataclass(frozen=True)
class ScaledAndLoweredSmallGroups(ScaledAndLowered):
    """The same of groups of 16 inputs, with scales and minima of 4 bits: of 64 inputs a line, uint8 [4 groups][16], a
    scale in the low half of a byte and a minimum in the high one.
    """

    group: ClassVar[int] = SMALL
    highest: ClassVar[int] = 15

    def _joined(self, scales: Array, minima: Array) -> Array:
        joined: Array = scales | minima << 4
        return joined

    def _parted(self, groups: Array) -> tuple[Array, Array]:
        return groups & 15, groups >> 4


@dataclass(frozen=True)
class ScaledSmallGroups(Superblocks):
    """w = (q - offset) * (d * scale); the signed scales of 64 inputs are a line, int8 [4 groups of 16 inputs][16].
    Factors of minima are zeros.
    """

    def quantise(self, weight: Array) -> tuple[Array, ...]:
        values, k = in_groups(weight, SPAN), weight.shape[1]
        groups = values.reshape(len(values), -1, SMALL)
        wanted = extremes(groups) / np.float32(-self.offset)
        by_span = wanted.reshape(*values.shape[:2], -1)
        d = to_halves(extremes(by_span) / np.float32(-128) + np.float32(0))
        scales = nearest(by_span, d.astype(np.float32), -128, 127)
        widths = spread(d, groups.shape[1], SPAN // SMALL) * scales
        codes = nearest(groups, widths, -self.offset, self.offset - 1)[:, :k] + self.offset
        return codes.astype(np.uint8), d, scales[:, : -(-k // SMALL)].astype(np.int8)

    def decode(self, codes: Array, *scales: Array) -> Floats:
        """codes: uint8; d: fp16 [n, ceil(k / 256)]; scales: int8 [n, ceil(k / 16)]."""
        d, widths = (spread(array, codes.shape[1], size) for array, size in zip(scales, (SPAN, SMALL), strict=True))
        values: Floats = d * widths * (codes.astype(np.float32) - self.offset)
        return values

    def _heads(self, shape: tuple[int, ...], *scales: Array) -> tuple[Array, Array]:
        inputs = round_up(shape[1], K_ALIGN)
        d, widths = (by_column(array, inputs, size) for array, size in zip(scales, (SPAN, SMALL), strict=True))
        header = np.stack([d, np.zeros_like(d)], axis=2).astype(np.float16, copy=False)
        heads = widths.astype(np.int8, copy=False).reshape(len(widths), -1, 4 * BLOCK)
        return header.reshape(len(header), -1), heads.view(np.uint32)[:, :, None]

    def _scales(self, header: Bytes, heads: Bytes) -> tuple[Array, ...]:
        factors = header.view(np.float16).reshape(len(header), -1, 2, BLOCK)
        return by_row(factors[:, :, 0]), by_row(heads.view(np.int8).reshape(len(heads), -1, BLOCK))
