"""nvfp4: e2m1 with an e4m3 scale for each 16 inputs and a float32 factor for each output column.

Checkpoints publish one factor for a whole matrix. Here every column has its own, so that matrices with different ones
(queries, keys and values; experts) can lie in one.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import LINE, Array, Bytes, Floats, all_finite, round_up
from hybrid.formats.fp4 import TOP, VALUES, Fp4, codes_of_pairs, nearest, to_words, words_of_pairs
from hybrid.formats.fp8 import LARGEST, encode, has_nan
from hybrid.formats.fp8 import VALUES as SCALES

GROUP = 16


class Nvfp4(Fp4):
    """In front of a block is a line, float32 [16 factors]; w = value * (scale * factor), scales e4m3."""

    name = "nvfp4"
    group = GROUP
    front = LINE
    padding = 0

    def pack(self, weight: Array) -> Bytes:
        n, k = weight.shape
        values = np.zeros((n, round_up(k, GROUP)), np.float32)
        values[:, :k] = weight
        codes, scales, factors = quantise(values.reshape(n, -1, GROUP))
        return self.join(scales, to_words(codes.reshape(n, -1)), factors)

    def pack_blocks(self, pairs: Bytes, scales: Array, factors: Floats) -> Bytes:
        """Published bytes as they are: uint8 [n, k / 2] of two codes each, scales e4m3 [n, k / 16] and float32 factors
        [n].
        """
        return self.join(scales.view(np.uint8), words_of_pairs(pairs), factors)

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        codes, scales, front = self.split(packed, n, k)
        return _values(codes, scales, np.ascontiguousarray(front).view(np.float32).reshape(-1)[:n])

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return all_finite(np.ascontiguousarray(blocks[:, :LINE]).view(np.float32)) and not has_nan(
            np.ascontiguousarray(self.scales_of(blocks, inputs))
        )


def decode(pairs: Bytes, scales: Array, factors: Floats) -> Floats:
    """Published bytes, as `Nvfp4.pack_blocks` takes them, as float32 [n, k]."""
    return _values(codes_of_pairs(pairs), scales.view(np.uint8), factors)


def quantise(values: Floats) -> tuple[Bytes, Bytes, Floats]:
    """Codes [n, groups, 16], e4m3 scales [n, groups] and factors [n] of groups of values [n, groups, 16].

    A factor is such that the largest group of its column has the largest scale.
    """
    largest = np.abs(values).max(axis=-1)
    factors = largest.max(axis=-1) / np.float32(LARGEST * TOP)
    wanted = largest / np.float32(TOP) / np.where(factors > 0, factors, np.float32(1))[:, None]
    scales = encode(wanted)
    steps = SCALES[scales] * factors[:, None]
    codes = nearest(np.divide(values, np.where(steps > 0, steps, 1)[..., None], dtype=np.float32))
    return codes, scales, factors


def _values(codes: Bytes, scales: Bytes, factors: Floats) -> Floats:
    steps = np.take(SCALES, scales) * factors[:, None]
    values: Floats = np.take(VALUES, codes) * steps.repeat(GROUP, axis=1)[:, : codes.shape[1]]
    return values
