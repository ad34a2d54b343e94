"""Words of 32 bits that hold codes of 2, 3, 4 or 8 bits."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import Array, Bytes

BITS = (2, 3, 4, 8)  # of codes that are read
WORD_BITS = 32
IN_ORDER = tuple(range(8))  # which of eight neighbours the i-th code of a word is


def words_of(codes: int, bits: int) -> int:
    """How many words so many codes take."""
    return -(-codes * bits // WORD_BITS)


def unpacked(words: Array, bits: int, order: tuple[int, ...] = IN_ORDER) -> Bytes:
    """The codes of uint32 words [rows, words], the lowest bits first: uint8 [rows, words * 32 / bits].

    Codes of 3 bits run on from a word into the next; what is left of the last words of a row are no codes.
    """
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stored
    if bits == 3:
        triples = stored[:, : stored.shape[1] // 3 * 3].reshape(len(stored), -1, 3).astype(np.uint32)
        joined = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        codes = (joined[..., None] >> np.arange(0, 24, 3, dtype=np.uint32) & np.uint32(7)).astype(np.uint8)
    else:
        codes = stored[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
    flat: Bytes = codes.reshape(len(stored), -1)
    if order == IN_ORDER:
        return flat
    return np.ascontiguousarray(flat.reshape(len(flat), -1, 8)[..., np.argsort(order)]).reshape(flat.shape)


def unpacked_less(words: Array, bits: int) -> Bytes:
    """Codes that were stored one less than they are.

    Programs that write and read these take the ones off a word as a whole, and add them to it, so that a zero borrows
    from its neighbour. Codes of 3 bits, which lie in two words, come back to 0 by themselves.
    """
    if bits == 3:
        return unpacked(words, bits) + np.uint8(1) & np.uint8(7)
    return unpacked(words + np.uint32(sum(1 << at for at in range(0, WORD_BITS, bits))), bits)
