"""Numbers of few bits in the bytes of GGUF blocks."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import Array, Bytes


def halves(blocks: Bytes, at: int) -> Array:
    """The float16 that lies `at` so many bytes in each block [n, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def words(blocks: Bytes, at: int, count: int, type: type[np.unsignedinteger]) -> Array:
    """`count` little-endian numbers that lie `at` so many bytes in each block: [n, blocks, count]."""
    size = count * np.dtype(type).itemsize
    found: Array = np.ascontiguousarray(blocks[..., at : at + size]).view(type)
    return found


def nibbles(packed: Bytes) -> Bytes:
    """Low halves, then high halves of each group of bytes [..., bytes]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def fields(packed: Array, bits: int, count: int) -> Array:
    """`count` numbers of so many bits out of each word [..., words], the lowest first: [..., words * count]."""
    shifts = (np.arange(count) * bits).astype(packed.dtype)
    found: Array = packed[..., None] >> shifts & packed.dtype.type((1 << bits) - 1)
    return found.reshape(*packed.shape[:-1], -1)


def flat(codes: Array) -> Array:
    return codes.reshape(len(codes), -1)
