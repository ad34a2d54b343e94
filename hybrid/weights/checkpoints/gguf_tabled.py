"""Blocks of GGUF types whose values are one of sixteen whole numbers times a scale, as the packed format takes them.

Those named IQ choose eight or four magnitudes at a time from a list of the type, `gguf_grids.npz`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from hybrid.formats.block import Array, Bytes
from hybrid.weights.checkpoints.gguf_bits import fields, flat, halves, nibbles, words

GRIDS = Path(__file__).parents[2] / "assets" / "gguf_grids.npz"
Parts = tuple[Array, ...]  # codes [rows, columns], factors of 256 and scales of 16 values, and the table of the type

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _table(*numbers: int) -> Array:
    """What codes stand for: these, then 0."""
    return np.array([*numbers, *[0] * (16 - len(numbers))], np.int8)


def _signed_table(*magnitudes: int) -> Array:
    """Of codes whose highest bit is a sign."""
    first = _table(*magnitudes)[:8]
    return np.concatenate([first, -first])


_IQ1, _IQ2 = _table(-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7), _signed_table(8, 25, 43)
_IQ3_XXS, _IQ3_S = _signed_table(4, 12, 20, 28, 36, 44, 52, 62), _signed_table(*range(1, 16, 2))
_Q3, _TERNARY = _table(*range(-4, 4)), _table(-1, 0, 1, 2)


@cache
def _grid(type: str) -> Bytes:
    """Which of the magnitudes of a type each entry of its list has: [entries, 8 or 4]."""
    with np.load(GRIDS) as grids:
        found: Bytes = grids[type]
    return found


@cache
def _even_signs() -> Bytes:
    """Eight signs out of seven bits: a number of them that is even is set."""
    seven = np.arange(128, dtype=np.uint8)
    odd: Bytes = np.unpackbits(seven[:, None], axis=1).sum(axis=1, dtype=np.uint8) & 1
    return seven | odd << np.uint8(7)


def _with_signs(magnitudes: Array, signs: Array) -> Array:
    """Codes [n, columns] of magnitudes [n, ...] and bytes of eight signs [n, ...], in order."""
    bits: Bytes = np.unpackbits(flat(signs), axis=1, bitorder="little") << np.uint8(3)
    codes: Array = flat(magnitudes) | bits
    return codes


def _parts(codes: Array, d: Array, scales: Array, table: Array, divisor: int = 1) -> Parts:
    """d: fp16 [n, blocks], to be divided by a power of two. scales: [n, blocks, 8 or 16]."""
    of_16 = np.repeat(scales, 16 // scales.shape[-1], axis=-1)
    return flat(codes), d.astype(np.float32) / np.float32(divisor), flat(of_16.astype(np.int8)), table


def _iq1_codes(entries: Array, lowered: Array) -> Array:
    """entries: of the list, for eight values each. lowered: whether an eighth is taken off these, not added."""
    return _grid("iq1_s")[flat(entries)] | (flat(lowered) << 3)[..., None].astype(np.uint8)


def _iq1_s(blocks: Bytes) -> Parts:
    high = words(blocks, 34, 8, np.uint16)
    entries = blocks[..., 2:34] | fields(high, 3, 4) << 8
    codes = _iq1_codes(entries, np.repeat(high >> 15, 4, axis=-1))
    return _parts(codes, halves(blocks, 0), (high >> 12 & 7) * 2 + 1, _IQ1, 8)


def _iq1_m(blocks: Bytes) -> Parts:
    """The factor is in the highest four bits of the words of scales."""
    high, scales = fields(blocks[..., 32:48], 4, 2), words(blocks, 48, 4, np.uint16)
    entries = blocks[..., :32] | (high & 7).astype(np.uint16) << 8
    bits = (scales >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=-1, dtype=np.uint16)
    return _parts(_iq1_codes(entries, high >> 3), bits.view(np.float16), fields(scales, 3, 4) * 2 + 1, _IQ1, 8)


def _iq2_xxs(blocks: Bytes) -> Parts:
    both = words(blocks, 2, 16, np.uint32)
    entries, signs = np.ascontiguousarray(both[..., 0::2]).view(np.uint8), both[..., 1::2]
    codes = _with_signs(_grid("iq2_xxs")[entries], _even_signs()[fields(signs, 7, 4)])
    return _parts(codes, halves(blocks, 0), (signs >> 28) * 2 + 1, _IQ2, 8)


def _iq2_xs(blocks: Bytes) -> Parts:
    both = words(blocks, 2, 32, np.uint16)
    codes = _with_signs(_grid("iq2_xs")[both & 511], _even_signs()[both >> 9])
    return _parts(codes, halves(blocks, 0), fields(blocks[..., 66:], 4, 2) * 2 + 1, _IQ2, 8)


def _iq2_s(blocks: Bytes) -> Parts:
    entries = blocks[..., 2:34] | fields(blocks[..., 66:74], 2, 4).astype(np.uint16) << 8
    codes = _with_signs(_grid("iq2_s")[entries], blocks[..., 34:66])
    return _parts(codes, halves(blocks, 0), fields(blocks[..., 74:], 4, 2) * 2 + 1, _IQ2, 8)


def _iq3_xxs(blocks: Bytes) -> Parts:
    signs = words(blocks, 66, 8, np.uint32)
    codes = _with_signs(_grid("iq3_xxs")[blocks[..., 2:66]], _even_signs()[fields(signs, 7, 4)])
    return _parts(codes, halves(blocks, 0), (signs >> 28) * 2 + 1, _IQ3_XXS, 4)


def _iq3_s(blocks: Bytes) -> Parts:
    entries = blocks[..., 2:66] | fields(blocks[..., 66:74], 1, 8).astype(np.uint16) << 8
    codes = _with_signs(_grid("iq3_s")[entries], blocks[..., 74:106])
    return _parts(codes, halves(blocks, 0), fields(blocks[..., 106:], 4, 2) * 2 + 1, _IQ3_S)


def _iq4_xs(blocks: Bytes) -> Parts:
    scales = fields(blocks[..., 4:8], 4, 2) | fields(words(blocks, 2, 1, np.uint16), 2, 8).astype(np.uint8) << 4
    codes = nibbles(blocks[..., 8:].reshape(*blocks.shape[:-1], 8, 16))
    return _parts(codes, halves(blocks, 0), scales.astype(np.int8) - np.int8(32), IQ4_VALUES)


def _q3_k(blocks: Bytes) -> Parts:
    """High bits are set where nothing is taken off."""
    shape = blocks.shape[:-1]
    high = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    low = blocks[..., 32:96].reshape(*shape, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = low.reshape(*shape, 256) | (high << 2).reshape(*shape, 256)
    packed = blocks[..., 96:108]
    twos = packed[..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = (nibbles(packed[..., :8]) | twos.reshape(*shape, 16) << 4).astype(np.int8) - np.int8(32)
    return _parts(codes, halves(blocks, 108), scales, _Q3)


def _ternary(codes: Array, d: Array) -> Parts:
    return _parts(codes, d, np.ones((*d.shape, 16), np.int8), _TERNARY)


def _tq1_0(blocks: Bytes) -> Parts:
    """Five digits to the base of three in a byte, as the fraction of 256; in the last bytes four."""
    parts = []
    for first, last, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        shifted = blocks[..., None, first:last] * np.uint8(3) ** np.arange(digits, dtype=np.uint8)[:, None]
        parts.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape[:-1], -1))
    return _ternary(np.concatenate(parts, axis=-1), halves(blocks, 52))


def _tq2_0(blocks: Bytes) -> Parts:
    codes = blocks[..., :64].reshape(*blocks.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return _ternary(codes, halves(blocks, 64))


TABLED: dict[str, Callable[[Bytes], Parts]] = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s, "IQ4_XS": _iq4_xs, "Q3_K": _q3_k, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
}  # fmt: skip
