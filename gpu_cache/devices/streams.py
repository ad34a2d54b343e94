"""What `CudaDevice` needs of a device with queues: memory, copies, work, and events that order them.

There are two: `torch_streams.TorchStreams` on a GPU, and a stand-in in the tests that runs queued work in any order
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
    """A thread of the host that runs tasks one after another."""

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task, which must not raise."""

    def drain(self) -> None:
        """Block until all submitted tasks are done."""

    def close(self) -> None:
        """Block until the current task is done; drop the waiting ones."""


class Streams(Protocol):
    """Calls that take a stream only queue. Work on one stream runs in order; between two streams only `wait` gives an
    order.

    Every call may raise `DeviceLost`. One thread and the worker's tasks call it.
    """

    copy: Stream
    compute: Stream

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Memory:
        """Uninitialised memory of the device. Raises DeviceFull."""

    def staging(self, nbytes: int) -> Bytes:
        """Pinned memory of the host. Raises PinningRefused."""

    def pin(self, regions: Sequence[Bytes]) -> None:
        """Pin existing memory until `close`. Raises PinningRefused."""

    def fill(self, stream: Stream, target: Memory, value: int) -> None:
        """Queue: every element of the target becomes `value`."""

    def upload(self, stream: Stream, target: Memory, host: Bytes) -> None:
        """Queue a copy of host bytes, which must not change until it is done."""

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        """Queue what `work` does to memory of the device. On a GPU `work` is called at once and queues kernels."""

    def record(self, stream: Stream) -> Event:
        """An event that happens when everything queued on the stream so far is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Make later work on this stream wait for the event."""

    def done(self, event: Event) -> bool:
        """Whether it has happened."""

    def synchronise(self, event: Event) -> None:
        """Block until it has happened."""

    def seconds(self, first: Event, last: Event) -> float:
        """Seconds from one event to the other; both must have happened."""

    def worker(self) -> Worker: ...

    def close(self) -> None:
        """Wait for the queued work, ignoring its errors, and unpin. Raises nothing."""
