"""A simulated device in the host's memory: it has the protocol, races and results of a real one.

One thread computes experts, from the bytes of their slots alone. Another copies at a configured rate, or a `CopyClock`
decides when each copy ends, so that a run can be repeated exactly.
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
LOOK = 0.05  # seconds between checks that the copy thread is alive, while a run waits for a copy


@dataclass(frozen=True)
class CopySpeed:
    """Speed of a copy. latency: seconds before each begins. jitter: up to this many more seconds, at random."""

    bytes_per_second: float = float("inf")
    latency: float = 0.0
    jitter: float = 0.0
    seed: int = 0


class SimulatedDevice:
    """See `gpu_cache.device.Device`. If the copy thread dies, the pending copies fail; later ones get a new thread."""

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
        when it says so, whatever `speed` is; copies of streamed experts still end within their run. poison: overwrite
        an evicted expert at once. streams: add `STAGING` slots.
        """
        self.times = DeviceTimes()
        self.observer: Observer | None = None
        self._slots = slots
        self.memory = [_aligned(slots + STAGING * streams, size) for size in piece_bytes]
        self._source, self._speed, self._clock = source, speed or CopySpeed(), clock
        self._poison = poison
        self._compute = bind(self.memory)
        self._pending: dict[int, int] = {}  # slot -> key of copies not yet reported by `poll`
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
        self._pending[slot] = key  # last: a copy that a signal kept from being issued must not be waited for

    def poll(self) -> list[tuple[int, bool]]:
        if self._clock is not None:
            return [self._end_copy(slot) for slot in self._clock.due() if slot in self._pending]
        if not self._pending:
            return []
        alive = self._copies.is_alive()
        ended = self._take_ended()
        return ended if alive else ended + self._replace_copies()

    @property
    def pending(self) -> int:
        return len(self._pending)

    def load(self, slot: int, key: int) -> None:
        self._copy(slot, key, Event())

    def run(self, slot_ids: SlotIds, streamed: Sequence[int] = ()) -> Event:
        on_thread = bool(self._pending) and self._clock is None  # `poll` reports these before their thread is replaced
        if streamed and not on_thread and not self._copies.is_alive():
            self._copies = self._start_copies()
        self._idle.clear()
        self._runs.put((slot_ids, streamed))
        return self._idle

    run_looked_up = None  # the host always knows the chosen experts first

    def join(self, ticket: Event) -> None:
        ticket.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, ticket: Event) -> None:
        """Nothing to do: a joined run has ended."""

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
            except BaseException as error:  # raised by `join`
                self._error = error
            self._idle.set()

    def _run(self, slot_ids: SlotIds) -> None:
        start = perf_counter()
        try:
            self._compute(slot_ids)
        finally:
            self.times.run += self._report_span("hits", start)

    def _report_span(self, what: str, start: float) -> float:
        """Report a span that ends now to the observer; returns its seconds."""
        end = perf_counter()
        if self.observer is not None:
            self.observer(what, start, end)
        return end - start

    def _run_streamed(self, slot_ids: SlotIds, keys: Sequence[int]) -> None:
        """Copy each streamed expert while the previous one is computed. Experts in slots are computed first."""
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
        """Issue the copy of a streamed expert. The previous expert in its slot has been computed."""
        slot = self._slots + number % STAGING
        self._forget(slot)
        return _StagedCopy(self._copies, slot, key)

    def _forget(self, slot: int) -> None:
        if self._poison:
            for memory in self.memory:
                memory[slot] = POISON

    def _replace_copies(self) -> list[tuple[int, bool]]:
        """Start a new copy thread; returns the copies that failed with the old one."""
        failed = [(slot, False) for slot in self._pending]
        self.times.failed_copies += len(failed)
        self._pending.clear()
        self._copies = self._start_copies()
        return failed

    def _start_copies(self) -> _CopyThread:
        return _CopyThread(self._copy, self._ended, self._speed)

    def _take_ended(self) -> list[tuple[int, bool]]:
        slots = [self._ended.popleft() for _ in range(len(self._ended))]
        for slot in slots:
            self._pending.pop(slot, None)
        return [(slot, True) for slot in slots]

    def _end_copy(self, slot: int) -> tuple[int, bool]:
        self._copy(slot, self._pending.pop(slot), Event())
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
        self.times.copy += self._report_span("copy", start)
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
        """Wait until the slot holds the expert; copy it here if the thread has died."""
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
