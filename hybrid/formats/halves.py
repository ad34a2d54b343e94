"""Groups of 32 inputs with a scale in fp16, and perhaps a minimum in fp16: GGUF's Q8_0, Q4_0, Q5_0, Q4_1 and Q5_1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.formats.block import BLOCK, GROUP, K_ALIGN, Array, Bytes, Floats, all_finite, round_up
from hybrid.formats.grouped import Grouped, by_column, by_row, extremes, in_groups, nearest, spread, to_halves


@dataclass(frozen=True)
class Scaled(Grouped):
    """w = (q - offset) * scale; the scales of 64 inputs are a line, fp16 [2 groups][16]. Codes of 8 bits are signed."""

    @property
    def head_lines(self) -> int:
        return 1

    def quantise(self, weight: Array) -> tuple[Array, ...]:
        values, k = in_groups(weight, GROUP), weight.shape[1]
        bound = 1 << self.bits - 1
        if self.bits == 8:
            scales = to_halves(np.abs(values).max(axis=-1) / np.float32(bound - 1))
        else:  # the value of largest magnitude is the lowest code, of which there is one more than of high ones
            scales = to_halves(extremes(values) / np.float32(-bound) + np.float32(0))
        codes = nearest(values, scales.astype(np.float32), -bound, bound - 1)[:, :k] + self.offset
        return codes.astype(np.int8 if self.bits == 8 else np.uint8), scales

    def decode(self, codes: Array, *scales: Array) -> Floats:
        """codes: uint8, or int8 of 8 bits; scales: fp16 [n, ceil(k / 32)]."""
        values: Floats = codes.astype(np.float32)
        values -= self.offset
        values *= spread(scales[0], codes.shape[1], GROUP)
        return values

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return all_finite(self._split(blocks, inputs)[1].view(np.float16))

    def _heads(self, shape: tuple[int, ...], *scales: Array) -> tuple[Array, Array]:
        inputs = round_up(shape[1], K_ALIGN)
        groups = [by_column(array.astype(np.float16, copy=False), inputs, GROUP) for array in scales]
        heads = np.stack(groups, axis=2).view(np.uint32)  # [blocks, groups, arrays, 8]
        none = np.zeros((len(heads), 0), np.uint32)
        return none, heads.reshape(len(heads), inputs // K_ALIGN, self.head_lines, BLOCK)

    def _scales(self, header: Bytes, heads: Bytes) -> tuple[Array, ...]:
        groups = heads.view(np.float16).reshape(len(heads), -1, self.head_lines, BLOCK)
        return tuple(by_row(groups[:, :, index]) for index in range(self.head_lines))


@dataclass(frozen=True)
class ScaledFromMinimum(Scaled):
    """w = q * scale + minimum; the scales and minima of 32 inputs are a line, fp16 [16 scales][16 minima]."""

    @property
    def head_lines(self) -> int:
        return 2

    def quantise(self, weight: Array) -> tuple[Array, ...]:
        values, highest = in_groups(weight, GROUP), (1 << self.bits) - 1
        minima = to_halves(values.min(axis=-1))
        floor = minima.astype(np.float32)
        scales = to_halves(np.maximum(values.max(axis=-1) - floor, 0) / np.float32(highest))
        codes = nearest(values - floor[..., None], scales.astype(np.float32), 0, highest)
        return codes[:, : weight.shape[1]].astype(np.uint8), scales, minima

    def decode(self, codes: Array, *scales: Array) -> Floats:
        """codes: uint8; scales and minima: fp16 [n, ceil(k / 32)]."""
        values = super().decode(codes, scales[0])
        values += spread(scales[1], codes.shape[1], GROUP)
        return values
