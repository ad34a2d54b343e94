"""What a device with queues must offer to `CudaDevice`: memory, copies, work, and events that order them.

Two things do: `torch_streams.TorchStreams` on a GPU, and in the tests a stand-in that runs what is queued in any order
that streams and events allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpu_cache.device import Bytes

Memory = Any  # on the device: indexed and sliced like an array
Stream = Any
Event = Any


class Worker(Protocol):
    """A thread of the host that does one thing after another."""

    def submit(self, task: Callable[[], None]) -> None:
        """A task raises nothing."""

    def drain(self) -> None:
        """Return when all that was submitted is done."""

    def close(self) -> None:
        """Return when the task at hand is done; those that wait are dropped."""


class Streams(Protocol):
    """Nothing that takes a stream has happened when a call returns. What is queued on one stream happens in order; what
    is on two, in any, but for `wait`.

    Every call may raise `DeviceLost`. One thread and the worker's tasks call it.
    """

    copy: Stream
    compute: Stream

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Memory:
        """Memory of the device, whatever is in it. Raises DeviceFull."""

    def staging(self, nbytes: int) -> Bytes:
        """Pinned memory of the host. Raises PinningRefused."""

    def pin(self, regions: Sequence[Bytes]) -> None:
        """Pin memory that is there already, until `close`. Raises PinningRefused."""

    def fill(self, stream: Stream, target: Memory, value: int) -> None:
        """Queue: every element of the target becomes `value`."""

    def upload(self, stream: Stream, target: Memory, host: Bytes) -> None:
        """Queue a copy of bytes of the host, which may not change until it is done."""

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        """Queue what `work` does to memory of the device. On a GPU it is called at once and queues kernels."""

    def record(self, stream: Stream) -> Event:
        """An event that happens when all that was queued on the stream has."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Queue: what comes later on this stream happens after the event."""

    def done(self, event: Event) -> bool:
        """Whether it has happened."""

    def synchronise(self, event: Event) -> None:
        """Return when it has happened."""

    def seconds(self, first: Event, last: Event) -> float:
        """From one event to another; both have happened."""

    def worker(self) -> Worker: ...

    def close(self) -> None:
        """Wait for what is queued, whatever comes of it, and unpin. Raises nothing."""
