"""Keys and values of some tokens outside of any sequence: what a prompt that begins with these tokens can be given."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence

import numpy as np

from hybrid.formats.block import round_up


class Saved:
    """Keys and values of `tokens` tokens, each run of the arena after the other, in memory that goes back to the
    system with them. widths: bytes of a token in each run. Raises OSError when there is no memory left.
    """

    def __init__(self, widths: Sequence[int], tokens: int) -> None:
        self.widths, self.tokens = widths, tokens
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.nbytes = self.size(widths, tokens)
        self.memory = np.frombuffer(mmap.mmap(-1, self.nbytes, flags=flags), np.uint8)

    @staticmethod
    def size(widths: Sequence[int], tokens: int) -> int:
        """Bytes that so many tokens take: whole pages."""
        return round_up(max(1, sum(widths) * tokens), mmap.PAGESIZE)

    def runs(self) -> Iterator[int]:
        """The address of each run."""
        address = self.memory.ctypes.data
        for width in self.widths:
            yield address
            address += width * self.tokens

    def part(self, start: int, stop: int) -> Saved:
        """A copy of the tokens from `start` to `stop`. Raises OSError when there is no memory left."""
        part = Saved(self.widths, stop - start)
        for source, target, width in zip(self.runs(), part.runs(), self.widths, strict=True):
            ctypes.memmove(target, source + start * width, part.tokens * width)
        return part
