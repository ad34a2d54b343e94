"""A ring of pinned buffers through which weights are copied to a device, so that only the ring must be pinned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_cache.device import Bytes
from gpu_cache.devices.streams import Event, Memory, Streams
from gpu_cache.errors import PinningRefused

BUFFER_BYTES = 8 << 20  # a copy of so much takes 0.3 ms at 25 GB/s, a launch 0.01
BUFFERS = 4  # one is filled, one is copied from, and two even out the difference


@dataclass(eq=False)
class _Buffer:
    """Staging memory. free: the event after which it may be written again."""

    memory: Bytes
    free: Event = None


class StagingRing:
    """Copies in chunks of at most `size` bytes, on the copy stream. One thread at a time uses it.

    chunks: (piece, first byte, last byte), which make up an expert.
    """

    def __init__(self, streams: Streams, piece_bytes: Sequence[int], size: int, note: Callable[[str], None]) -> None:
        """note: called with one line if memory cannot be pinned. Unpinned buffers also work: such a copy blocks, and is
        slower.
        """
        self._streams, self._next = streams, 0
        self.chunks = list(_chunks(piece_bytes, size))
        size = min(size, max(piece_bytes))
        try:
            self._buffers = [_Buffer(streams.staging(size)) for _ in range(BUFFERS)]
        except PinningRefused as error:
            note(f"{error}; copies are slower, from memory that is not pinned")
            self._buffers = [_Buffer(np.empty(size, np.uint8)) for _ in range(BUFFERS)]

    def copy(self, target: Memory, host: Bytes) -> None:
        """Queue a copy of a chunk; `host` may change once this returns. (2) A buffer is written again after the copy
        from it has ended.
        """
        streams, buffer = self._streams, self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.free is not None:
            streams.synchronise(buffer.free)
        staged = buffer.memory[: len(host)]
        np.copyto(staged, host)
        streams.upload(streams.copy, target, staged)
        buffer.free = streams.record(streams.copy)


def _chunks(piece_bytes: Sequence[int], maximum: int) -> Iterator[tuple[int, int, int]]:
    for piece, size in enumerate(piece_bytes):
        for first in range(0, size, maximum):
            yield piece, first, min(size, first + maximum)
