"""A device driven through streams: slots in its memory, copies on their own stream, and events that mark their end.

A slot holds exactly the host's bytes of its expert: one copy is enough, nothing is repacked, and a slot can be compared
with the host by checksum. `docs/hybrid.md` has a table of what waits for what; (1) to (7) are its rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Protocol

import numpy as np

from gpu_cache.clock import CopyClock
from gpu_cache.device import STAGING, Bytes, DeviceTimes, Observer, SlotIds, Source
from gpu_cache.devices.staging import BUFFER_BYTES, StagingRing
from gpu_cache.devices.streams import Event, Memory, Streams
from gpu_cache.errors import CacheError, DeviceLost, PinningRefused

NOWHERE = -1  # in the table on the device: no slot
POISON = 0xFF  # as a scale or a float: not a number


class QueuedCompute(Protocol):
    """Computes the experts of a layer from the bytes of slots. Every call but `collect` queues on the current stream.

    One layer at a time. `begin` is called by the thread that runs the layer, `experts` and `end` by it or the worker.
    """

    def begin(self, slot_ids: SlotIds) -> None:
        """Start a layer. slot_ids: see `gpu_cache.device.Device.run`; they do not change until `collect`."""

    def experts(self, ids: range, slot: int) -> None:
        """Compute the experts with these ids: the first is in `slot`, the others in the slots that follow."""

    def end(self) -> None:
        """Finish a layer after all of its experts."""

    def run_looked_up(self, slot_of: Memory, first: int, rows: int) -> None:
        """Run a whole layer when only the device knows the chosen experts and their slots, see
        `CudaDevice.run_looked_up`.
        """

    def collect(self) -> None:
        """The host's part, after the layer has ended on the device, or with `results_stay_on_device` after it is
        queued.
        """

    @property
    def results_stay_on_device(self) -> bool:
        """Whether only later work on the compute stream reads the results."""


@dataclass(eq=False)
class _Copy:
    """A copy in flight. event: its last byte has arrived, None until queued. run, id: for a streamed expert; run is
    None for a slot of the table.
    """

    slot: int
    key: int
    after: Event = None
    run: _Run | None = None
    id: int = 0
    first: Event = None
    event: Event = None
    failed: bool = False


@dataclass(eq=False)
class _Run:
    """One layer on the device. event: all of it is done, None until queued. error: what made it fail."""

    first: Event
    event: Event = None
    streamed: list[_Copy] = field(default_factory=list)
    error: Exception | None = None
    joined: bool = False


class CudaDevice:
    """See `gpu_cache.device.Device`; here a slot may be written even while a run that uses it has not been joined.

    memory: an array uint8 [slots, bytes] for each piece, the streaming slots last. slot_of: int32 [keys] on the
    device, the slot of every expert or -1, for kernels on the compute stream that look experts up themselves; None
    if none does. notes: one line for each request that could not be met.
    """

    def __init__(
        self,
        streams: Streams,
        slots: int,
        piece_bytes: Sequence[int],
        source: Source,
        bind: Callable[[Sequence[Memory]], QueuedCompute],
        keys: int = 0,
        clock: CopyClock | None = None,
        poison: bool = False,
        pinned: Sequence[Bytes] = (),
        staging_bytes: int = BUFFER_BYTES,
        streaming: bool = False,
    ) -> None:
        """bind: called once with `memory`. keys: number of experts in all layers if kernels look them up, else 0.
        pinned: all memory that `source` may return, to be pinned and copied from directly. clock, poison: as for the
        simulated device. streaming: add `STAGING` slots. Raises DeviceFull.
        """
        self._times = DeviceTimes()
        self._joined: deque[_Run] = deque()  # joined runs whose times are not known yet
        self.notes: list[str] = []
        self.observer: Observer | None = None  # called when the host notices an end, which is a little late
        self._streams, self._source, self._clock, self._poison = streams, source, clock, poison
        self._slots = slots
        self.memory = [streams.allocate((slots + STAGING * streaming, size)) for size in piece_bytes]
        self._passed = [streams.record(streams.compute) for _ in range(STAGING * streaming)]
        self.slot_of = streams.allocate((keys,), np.int32) if keys else None
        if keys:
            streams.fill(streams.compute, self.slot_of, NOWHERE)
        self._compute = bind(self.memory)
        self._expert_bytes = sum(piece_bytes)
        direct = bool(pinned) and self._pin(pinned)
        self._ring = None if direct else StagingRing(streams, piece_bytes, staging_bytes, self.notes.append)
        self._key_of: list[int | None] = [None] * slots
        self._pending: deque[_Copy] = deque()  # copies not yet reported by `poll`
        self._lost: str | None = None  # why; an error itself would keep the frames of whoever it went through
        self._closing = False
        self._worker = streams.worker()

    @property
    def times(self) -> DeviceTimes:
        """Totals of the runs and copies that are known to have ended."""
        while self._joined and self._streams.done(self._joined[0].event):
            self._account(self._joined.popleft())
        return self._times

    def copy_in(self, slot: int, key: int) -> None:
        self._request_copy(slot, key)
        if self._clock is not None:
            self._clock.issue(slot)

    def poll(self) -> list[tuple[int, bool]]:
        if self._clock is not None:
            count = len([slot for slot in self._clock.due() if any(copy.slot == slot for copy in self._pending)])
            self._finish(count)
            return [self._report_copy() for _ in range(count)]
        return [self._report_copy() for _ in iter(self._next_ended, False)]

    @property
    def pending(self) -> int:
        return len(self._pending)

    def load(self, slot: int, key: int) -> None:
        """No other copy is in flight, because this is called before the first step."""
        self._request_copy(slot, key)
        self._finish(1)
        if not self._report_copy()[1]:
            raise DeviceLost(self._lost or f"expert {key} cannot be read from the memory of the host")

    def run(self, slot_ids: SlotIds, streamed: Sequence[int] = ()) -> _Run:
        self._require()
        streams = self._streams
        run = _Run(streams.record(streams.compute))
        streams.launch(streams.compute, partial(_queue_held, self._compute, slot_ids, self._slots, not streamed))
        if not streamed:
            run.event = streams.record(streams.compute)
        for number, key in enumerate(streamed):
            run.streamed.append(_Copy(self._slots + number % STAGING, key, run=run, id=self._slots + number))
        for copy in run.streamed:
            self._send(copy)
        return run

    @property
    def run_looked_up(self) -> Callable[[int, int], _Run] | None:
        return None if self.slot_of is None else self._run_looked_up

    def _run_looked_up(self, first: int, rows: int) -> _Run:
        """(7) Queued after the work that makes its rows and all earlier changes of the table, before later ones."""
        self._require()
        streams = self._streams
        run = _Run(streams.record(streams.compute))
        streams.launch(streams.compute, partial(self._compute.run_looked_up, self.slot_of, first, rows))
        run.event = streams.record(streams.compute)
        return run

    def join(self, ticket: _Run) -> None:
        if ticket.joined:
            return
        ticket.joined = True
        if ticket.streamed:
            self._require_queued(ticket)
        if self.observer is None and self._compute.results_stay_on_device:
            self._joined.append(ticket)
        else:
            self._streams.synchronise(ticket.event)
            self._account(ticket)
        self._compute.collect()

    def wait(self, ticket: _Run) -> None:
        self._streams.synchronise(ticket.event)

    def forget(self) -> None:
        self._key_of = [None] * self._slots
        if self.slot_of is not None:
            self._streams.fill(self._streams.compute, self.slot_of, NOWHERE)

    def _account(self, run: _Run) -> None:
        """Add the times of a run that has ended."""
        self._times.run += self._observe("hits", run.first, run.event)
        for copy in run.streamed:
            self._times.streamed += 1
            self._times.streamed_bytes += self._expert_bytes
            self._times.copy += self._observe("copy", copy.first, copy.event)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._worker.close()
        self._streams.close()
        self._pending.clear()
        self._joined.clear()
        self.memory.clear()  # at once, not when this object is collected: the next device may need the memory
        self.slot_of = None
        del self._compute

    def _request_copy(self, slot: int, key: int) -> None:
        """(1) Remove the old expert from the device's table on the compute stream; the copy waits for that, so every
        earlier reader of the slot is done.
        """
        self._require()
        streams = self._streams
        old = self._key_of[slot]
        if old is not None:
            self._set_slot(old, NOWHERE)
        self._key_of[slot] = None
        copy = _Copy(slot, key, streams.record(streams.compute))
        self._send(copy)
        self._pending.append(copy)

    def _send(self, copy: _Copy) -> None:
        if self._ring is None:
            self._begin(copy)
            for piece, host in enumerate(self._source(copy.key)):
                self._streams.upload(self._streams.copy, self.memory[piece][copy.slot], host)
            self._end(copy)
        else:
            for number in range(len(self._ring.chunks)):
                self._worker.submit(partial(self._stage, self._ring, copy, number))

    def _begin(self, copy: _Copy) -> None:
        """(5) A streaming slot is written again after the previous expert has been computed from it."""
        streams = self._streams
        streams.wait(streams.copy, copy.after if copy.run is None else self._passed[copy.slot - self._slots])
        copy.first = streams.record(streams.copy)
        if self._poison:
            for memory in self.memory:
                streams.fill(streams.copy, memory[copy.slot], POISON)

    def _end(self, copy: _Copy) -> None:
        copy.event = self._streams.record(self._streams.copy)
        if copy.run is not None:
            self._queue_streamed(copy, copy.run)

    def _queue_streamed(self, copy: _Copy, run: _Run) -> None:
        """(6) A streamed expert is computed once its last byte has arrived; the host does not wait for that."""
        streams = self._streams
        streams.wait(streams.compute, copy.event)
        streams.launch(streams.compute, partial(self._compute.experts, range(copy.id, copy.id + 1), copy.slot))
        self._passed[copy.slot - self._slots] = streams.record(streams.compute)
        if copy is run.streamed[-1]:
            streams.launch(streams.compute, self._compute.end)
            run.event = streams.record(streams.compute)

    def _require_queued(self, run: _Run) -> None:
        """Wait until all of a run is queued. Raises its error, if any, after the queued part has ended."""
        if not self._closing:
            self._worker.drain()
        error, run.error = run.error, None
        if error is not None:
            if self._lost is None:
                self._streams.synchronise(self._streams.record(self._streams.compute))
            raise error
        if run.event is None:
            raise CacheError("the device was closed in the middle of a run")

    def _stage(self, ring: StagingRing, copy: _Copy, number: int) -> None:
        """Copy one chunk. Runs on the worker."""
        if self._closing or copy.failed or (copy.run is not None and copy.run.error is not None):
            return
        try:
            if number == 0:
                self._begin(copy)
            piece, first, last = ring.chunks[number]
            ring.copy(self.memory[piece][copy.slot, first:last], self._source(copy.key)[piece][first:last])
            if number == len(ring.chunks) - 1:
                self._end(copy)
        except DeviceLost as error:
            self._lost = str(error)
            self._fail(copy, error)
        except Exception as error:  # of the host: reported with the copy or the run; the next one may succeed
            self._fail(copy, error)

    def _fail(self, copy: _Copy, error: Exception) -> None:
        copy.failed = True
        if copy.run is not None:
            copy.run.error = error

    def _next_ended(self) -> bool:
        if not self._pending:
            return False
        copy, done = self._pending[0], self._streams.done
        return copy.failed or (done(copy.after) and copy.event is not None and done(copy.event))

    def _finish(self, count: int) -> None:
        """Wait for the next copies to end."""
        self._worker.drain()
        for copy in list(self._pending)[:count]:
            if not copy.failed:
                self._streams.synchronise(copy.event)

    def _report_copy(self) -> tuple[int, bool]:
        """(3) An expert is in both tables, the host's and the device's, once its last byte is known to have arrived."""
        copy = self._pending.popleft()
        if copy.failed:
            self._times.failed_copies += 1
            return copy.slot, False
        self._key_of[copy.slot] = copy.key
        self._set_slot(copy.key, copy.slot)
        self._times.copies += 1
        self._times.copied_bytes += self._expert_bytes
        self._times.copy += self._observe("copy", copy.first, copy.event)
        return copy.slot, True

    def _observe(self, what: str, first: Event, last: Event) -> float:
        """Report to the observer; returns the seconds between two events that have happened."""
        seconds = self._streams.seconds(first, last)
        if self.observer is not None:
            now = perf_counter()
            self.observer(what, now - seconds, now)
        return seconds

    def _set_slot(self, key: int, slot: int) -> None:
        """(4) Kernels look up what the host knew when it queued them: the device's table changes in stream order."""
        if self.slot_of is not None:
            self._streams.fill(self._streams.compute, self.slot_of[key : key + 1], slot)

    def _require(self) -> None:
        if self._lost is not None:
            raise DeviceLost(self._lost)

    def _pin(self, regions: Sequence[Bytes]) -> bool:
        try:
            self._streams.pin(regions)
        except PinningRefused as error:
            self.notes.append(f"{error}; copies go through staging buffers instead")
            return False
        return True


def _queue_held(compute: QueuedCompute, slot_ids: SlotIds, slots: int, alone: bool) -> None:
    """alone: nothing is streamed."""
    compute.begin(slot_ids)
    compute.experts(range(slots), 0)
    if alone:
        compute.end()
