"""mxfp4: e2m1 with a power of two for each 32 inputs, as checkpoints publish it or made from others."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import GROUP, Array, Bytes, Floats, round_up
from hybrid.formats.fp4 import VALUES, Fp4, codes_of_pairs, nearest, to_words, words_of_pairs

BIAS = 127
LARGEST_EXPONENT = 125  # 6 * 2^126 is more than float32 holds
HIGHEST = BIAS + LARGEST_EXPONENT  # above come infinite weights, and the exponent that stands for no number
_TOP = 2  # exponent of the largest e2m1 value, 6 = 1.5 * 2^2


class Mxfp4(Fp4):
    """Scales are exponents: w = value * 2^(exponent - 127)."""

    name = "mxfp4"
    group = GROUP
    front = 0
    padding = BIAS

    def pack(self, weight: Array) -> Bytes:
        n, k = weight.shape
        values = np.zeros((n, round_up(k, GROUP)), np.float32)
        values[:, :k] = weight
        exponents, codes = quantise(np.ascontiguousarray(values.reshape(n, -1, GROUP).transpose(2, 0, 1)))
        return self.join(exponents, to_words(codes.transpose(1, 2, 0).reshape(n, -1)))

    def pack_blocks(self, blocks: Bytes, scales: Bytes) -> Bytes:
        """Published blocks as they are: uint8 [n, groups, 16] of two codes a byte, and exponents [n, groups]."""
        return self.join(scales, words_of_pairs(blocks.reshape(len(scales), -1)))

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        codes, exponents, _ = self.split(packed, n, k)
        values: Floats = np.take(VALUES, codes) * powers(exponents).repeat(GROUP, axis=1)[:, :k]
        return values

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        return not (self.scales_of(blocks, inputs) > HIGHEST).any()


def powers(exponents: Bytes) -> Floats:
    """2^(exponent - 127), exactly."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS)


def decode(blocks: Bytes, scales: Bytes) -> Floats:
    """Published blocks [n, groups, 16] and exponents [n, groups] as float32 [n, groups * 32]."""
    codes = codes_of_pairs(blocks)
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
    codes = nearest(values * np.ldexp(np.float32(1), -exponents))
    return (exponents + BIAS).astype(np.uint8), codes


def _errors(values: Floats, exponents: Array) -> Floats:
    """The squared error of each group with one choice of exponents."""
    scaled = np.abs(values)
    scaled *= np.ldexp(np.float32(1), -exponents)
    scaled -= np.take(VALUES, nearest(scaled))
    scaled *= scaled
    errors: Floats = np.ldexp(scaled.sum(axis=0), 2 * exponents)
    return errors
