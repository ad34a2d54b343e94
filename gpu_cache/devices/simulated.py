"""A device in the memory of the host: the protocol, its races and its results, with no device at hand.

Experts are computed from the bytes of their slot and from nothing else, by a thread of its own; another one copies at a
configured rate, or a `CopyClock` says when a copy ends, so that a run can be repeated exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from random import Random
from threading import Event, Thread
from time import perf_counter

import numpy as np

from gpu_cache.clock import CopyClock
from gpu_cache.device import STAGING, Bytes, Compute, DeviceTimes, Observer, Pieces, SlotIds, Source
from gpu_cache.errors import CacheError

CHUNK_BYTES = 1 << 20  # copied at a time, so that a copy can be slowed down evenly, and ended
ALIGNMENT = 64
POISON = 0xFF  # as a scale or a float: not a number
LOOK = 0.05  # seconds after which a run looks whether the thread whose copy it waits for is alive


@dataclass(frozen=True)
class CopySpeed:
    """How fast a copy is: bytes per second, seconds before each begins, and up to how many more, at random."""

    bytes_per_second: float = float("inf")
    latency: float = 0.0
    jitter: float = 0.0
    seed: int = 0


class SimulatedDevice:
    """See `gpu_cache.device.Device`. A copy thread that dies takes the copies that wait with it; the next one has a new
    thread.
    """

    def __init__(
        self,
        slots: int,
        piece_bytes: Sequence[int],
        source: Source,
        bind: Callable[[Pieces], Compute],
        speed: CopySpeed | None = None,
        clock: CopyClock | None = None,
        poison: bool = False,
        streams: bool = False,
    ) -> None:
        """bind: called once with the memory of the slots, an array [slots, bytes] for each piece. clock: copies end
        when it says so, whatever `speed` is; those of a stream end within their run all the same. poison: what is
        evicted becomes garbage at once. streams: have `STAGING` slots more.
        """
        self.times = DeviceTimes()
        self.observer: Observer | None = None
        self._slots = slots
        self.memory = [_aligned(slots + STAGING * streams, size) for size in piece_bytes]
        self._source, self._speed, self._clock = source, speed or CopySpeed(), clock
        self._poison = poison
        self._compute = bind(self.memory)
        self._asked: dict[int, int] = {}  # keys of the copies that `poll` has not told of, by slot
        self._ended: deque[int] = deque()
        self._copies = self._start_copies()
        self._runs: SimpleQueue[tuple[SlotIds, Sequence[int]] | None] = SimpleQueue()
        self._idle = Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._runner = Thread(target=self._run_all, name="simulated device", daemon=True)
        self._runner.start()

    @property
    def copy_thread(self) -> Thread:
        return self._copies

    def copy_in(self, slot: int, key: int) -> None:
        self._forget(slot)
        if self._clock is not None:
            self._clock.issue(slot)
        else:
            self._copies.waiting.put((slot, key, None))
        self._asked[slot] = key  # last: what a signal keeps from being asked for is not waited for

    def poll(self) -> list[tuple[int, bool]]:
        if self._clock is not None:
            return [self._end_copy(slot) for slot in self._clock.due() if slot in self._asked]
        if not self._asked:
            return []
        alive = self._copies.is_alive()
        ended = self._take_ended()
        return ended if alive else ended + self._replace_copies()

    @property
    def pending(self) -> int:
        return len(self._asked)

    def load(self, slot: int, key: int) -> None:
        self._copy(slot, key, Event())

    def run(self, slot_ids: SlotIds, streamed: Sequence[int] = ()) -> Event:
        self._idle.clear()
        self._runs.put((slot_ids, streamed))
        return self._idle

    run_found = None  # its rows are known to the host first

    def join(self, ticket: Event) -> None:
        ticket.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, ticket: Event) -> None:
        """It has ended when it is joined."""

    def forget(self) -> None:
        if self._poison:
            for memory in self.memory:
                memory[: self._slots] = POISON

    def close(self) -> None:
        self._copies.end()
        self._runs.put(None)
        self._runner.join()

    def _run_all(self) -> None:
        for slot_ids, streamed in iter(self._runs.get, None):
            try:
                if streamed:
                    self._run_streamed(slot_ids, streamed)
                else:
                    self._run(slot_ids)
            except BaseException as error:  # it belongs to who waits for the result
                self._error = error
            self._idle.set()

    def _run(self, slot_ids: SlotIds) -> None:
        start = perf_counter()
        try:
            self._compute(slot_ids)
        finally:
            self.times.run += self._tell("hits", start)

    def _tell(self, what: str, start: float) -> float:
        """Returns the seconds since `start`, which end something."""
        end = perf_counter()
        if self.observer is not None:
            self.observer(what, start, end)
        return end - start

    def _run_streamed(self, slot_ids: SlotIds, keys: Sequence[int]) -> None:
        """One expert is copied while the one before it is computed; what slots hold is computed first."""
        copies = [self._stage(i, key) for i, key in enumerate(keys[:STAGING])]
        held = np.where(slot_ids < self._slots, slot_ids, -1)
        if (held >= 0).any():
            self._run(held)
        for i in range(len(keys)):
            copies[i].wait()
            self._run(np.where(slot_ids == self._slots + i, copies[i].slot, -1))
            if i + STAGING < len(keys):
                copies.append(self._stage(i + STAGING, keys[i + STAGING]))

    def _stage(self, number: int, key: int) -> _StagedCopy:
        """Ask for the copy of a streamed expert; who used its slot before has been computed."""
        slot = self._slots + number % STAGING
        self._forget(slot)
        return _StagedCopy(self._copies, slot, key)

    def _forget(self, slot: int) -> None:
        if self._poison:
            for memory in self.memory:
                memory[slot] = POISON

    def _replace_copies(self) -> list[tuple[int, bool]]:
        """The copies that died with their thread; those to come have a new one."""
        failed = [(slot, False) for slot in self._asked]
        self.times.failed_copies += len(failed)
        self._asked.clear()
        self._copies = self._start_copies()
        return failed

    def _start_copies(self) -> _CopyThread:
        return _CopyThread(self._copy, self._ended, self._speed)

    def _take_ended(self) -> list[tuple[int, bool]]:
        slots = [self._ended.popleft() for _ in range(len(self._ended))]
        for slot in slots:
            self._asked.pop(slot, None)
        return [(slot, True) for slot in slots]

    def _end_copy(self, slot: int) -> tuple[int, bool]:
        self._copy(slot, self._asked.pop(slot), Event())
        return slot, True

    def _copy(self, slot: int, key: int, stop: Event) -> bool:
        """Copy all pieces, at the configured rate if there is one. False if `stop` came first."""
        start = perf_counter()
        done = 0
        for memory, piece in zip(self.memory, self._source(key), strict=True):
            for first in range(0, len(piece), CHUNK_BYTES):
                chunk = piece[first : first + CHUNK_BYTES]
                np.copyto(memory[slot, first : first + len(chunk)], chunk)
                done += len(chunk)
                left = start + done / self._speed.bytes_per_second - perf_counter()
                if self._clock is None and left > 0 and stop.wait(left):
                    return False
        self.times.copy += self._tell("copy", start)
        if slot >= self._slots:
            self.times.streamed += 1
            self.times.streamed_bytes += done
        else:
            self.times.copies += 1
            self.times.copied_bytes += done
        return True


class _CopyThread(Thread):
    """Copies one expert after another."""

    def __init__(self, copy: Callable[[int, int, Event], bool], ended: deque[int], speed: CopySpeed) -> None:
        super().__init__(name="simulated copies", daemon=True)
        self.waiting: SimpleQueue[tuple[int, int, Event | None] | None] = SimpleQueue()  # Event: of a staged copy
        self.copy, self._ended, self._speed = copy, ended, speed
        self._random = Random(speed.seed)
        self.stop_asked = Event()
        self.start()

    def run(self) -> None:
        for slot, key, done in iter(self.waiting.get, None):
            pause = self._speed.latency + self._random.random() * self._speed.jitter
            if (pause and self.stop_asked.wait(pause)) or not self.copy(slot, key, self.stop_asked):
                return
            if done is None:
                self._ended.append(slot)
            else:
                done.set()

    def end(self) -> None:
        self.stop_asked.set()
        self.waiting.put(None)
        self.join()


class _StagedCopy:
    """A copy that a run waits for."""

    def __init__(self, thread: _CopyThread, slot: int, key: int) -> None:
        self.slot, self._thread, self._key, self._done = slot, thread, key, Event()
        thread.waiting.put((slot, key, self._done))

    def wait(self) -> None:
        """Returns when the slot holds the expert, which is copied here if the thread has died."""
        while not self._done.wait(LOOK):
            if not self._thread.is_alive() and not self._done.is_set():
                if not self._thread.copy(self.slot, self._key, self._thread.stop_asked):
                    raise CacheError("the device was closed in the middle of a run")
                return


def _aligned(slots: int, size: int) -> Bytes:
    """[slots, size], each row at a multiple of a cache line if `size` is one."""
    memory = np.zeros(slots * size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + slots * size].reshape(slots, size)
