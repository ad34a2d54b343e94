"""Streams and events without a GPU: what is queued happens at a random time, in any order that the rules allow.

Memory of the device and of staging is garbage until something is written to it, a copy happens in two halves, and
nothing is known to have happened that nobody waited for. So a wait that is missing shows as wrong bytes for some seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np

from gpu_cache.errors import DeviceFull, DeviceLost, PinningRefused

GARBAGE = 0xA5
CHANGES = 0.05  # how often, a call, the streams get other speeds


class Event:
    happened = False


class StandIn:
    """See `gpu_cache.devices.streams.Streams`. capacity: bytes of the device; pinnable: of the host; lost_after: calls
    until the device is lost.
    """

    copy, compute, host = "copy", "compute", "host"
    at_once = 3  # things that may happen between two calls

    def __init__(self, seed: int = 0, capacity: float = np.inf, pinnable: float = np.inf, lost_after: float = np.inf):
        self.random = Random(seed)
        self.capacity, self.pinnable, self.lost_after = capacity, pinnable, lost_after
        self.queues: dict[str, deque[Any]] = {name: deque() for name in (self.copy, self.compute, self.host)}
        self.closed = False
        self._working = False
        self._failure: DeviceFull | None = None  # of work that happened in the middle of a task of the host
        self._speeds = [1.0] * len(self.queues)

    def allocate(self, shape: Sequence[int], dtype: Any = np.uint8) -> np.ndarray:
        memory = np.empty(tuple(shape), dtype)
        if memory.nbytes > self.capacity:
            raise DeviceFull(f"{memory.nbytes} bytes do not fit the device")
        self.capacity -= memory.nbytes
        # aligned to cache lines, which kernels of the CPU ask for
        place = np.full(memory.nbytes + 64, GARBAGE, np.uint8)
        start = -place.ctypes.data % 64
        return place[start : start + memory.nbytes].view(dtype).reshape(memory.shape)

    def staging(self, nbytes: int) -> np.ndarray:
        self._pin(nbytes)
        return np.full(nbytes, GARBAGE, np.uint8)

    def pin(self, regions: Sequence[np.ndarray]) -> None:
        for region in regions:
            self._pin(region.nbytes)

    def _pin(self, nbytes: int) -> None:
        if nbytes > self.pinnable:
            raise PinningRefused(f"pinned memory of {nbytes} bytes is refused")
        self.pinnable -= nbytes

    def fill(self, stream: str, target: np.ndarray, value: int) -> None:
        self._queue(stream, lambda: target.fill(value))

    def upload(self, stream: str, target: np.ndarray, host: np.ndarray) -> None:
        half = len(host) // 2
        self._queue(stream, lambda: np.copyto(target[:half], host[:half]))
        self._queue(stream, lambda: np.copyto(target[half:], host[half:]))

    def launch(self, stream: str, work: Callable[[], None]) -> None:
        self._queue(stream, work)

    def record(self, stream: str) -> Event:
        event = Event()
        self._queue(stream, lambda: setattr(event, "happened", True))
        return event

    def wait(self, stream: str, event: Event) -> None:
        self._queue(stream, event)

    def done(self, event: Event) -> bool:
        self._call()
        return event.happened

    def synchronise(self, event: Event) -> None:
        self._call()
        self._advance(lambda: event.happened)

    def seconds(self, first: Event, last: Event) -> float:
        assert first.happened and last.happened, "times of what has not happened"
        return 0.0

    def worker(self) -> Worker:
        return Worker(self)

    def close(self) -> None:
        self.queues[self.host].clear()
        with suppress(DeviceFull):
            self._advance(lambda: not any(self.queues.values()))
        self.closed = True

    def _queue(self, stream: str, what: Any) -> None:
        assert not self.closed
        self.queues[stream].append(what)
        self._call()

    def _call(self) -> None:
        """Time passes whenever the device is called, faster for one stream than for another."""
        self.lost_after -= 1
        if self.lost_after < 0:
            raise DeviceLost("an illegal memory access was encountered")
        if self.random.random() < CHANGES:
            self._speeds = [self.random.random() ** 3 + 1e-3 for _ in self.queues]
        for name in self.random.choices(list(self.queues), self._speeds, k=self.at_once):
            if self._able(name):
                self._step(name)
        self._tell_failure()

    def _advance(self, until: Callable[[], bool]) -> None:
        while not until():
            able = [name for name in self.queues if self._able(name)]
            assert able, "nothing can happen any more: they wait for each other"
            self._step(self.random.choice(able))
        self._tell_failure()

    def _tell_failure(self) -> None:
        """To who asked for work; a task of the host takes all errors for its own."""
        if self._failure and not self._working:
            failure, self._failure = self._failure, None
            raise failure

    def _able(self, name: str) -> bool:
        """Whether the next of a stream may happen."""
        if not self.queues[name] or (name == self.host and self._working):
            return False
        what = self.queues[name][0]
        return not isinstance(what, Event) or what.happened

    def _step(self, name: str) -> None:
        """A task of the host may wait inside; the rest goes on then."""
        what = self.queues[name].popleft()
        if isinstance(what, Event):
            return
        working, self._working = self._working, self._working or name == self.host
        try:
            what()
        except DeviceFull as error:
            if not working:
                raise
            self._failure = error
        finally:
            self._working = working


class Worker:
    """Its tasks are the queue of the host."""

    def __init__(self, streams: StandIn) -> None:
        self._streams = streams

    def submit(self, task: Callable[[], None]) -> None:
        self._streams._queue(StandIn.host, task)

    def drain(self) -> None:
        streams = self._streams
        streams._advance(lambda: not streams.queues[StandIn.host] and not streams._working)

    def close(self) -> None:
        self._streams.queues[StandIn.host].clear()
