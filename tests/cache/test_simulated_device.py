"""The simulated device keeps to the interface: nothing has happened when a call returns, and everything is told of."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from gpu_cache.clock import CopyClock
from gpu_cache.devices.simulated import POISON, CopySpeed, SimulatedDevice
from gpu_cache.errors import CacheError

SIZES = (192, 64)  # bytes of the pieces of an expert
PATIENCE = 600  # seconds until a test that hangs fails


def source(key: int) -> list[np.ndarray]:
    return [np.full(size, key + 10 * i, np.uint8) for i, size in enumerate(SIZES)]


class Runs:
    """A compute that keeps what it was asked for, and can be held up or fail."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, slot_ids: np.ndarray) -> None:
        assert self.gate.wait(PATIENCE)
        self.seen.append(slot_ids.copy())
        if self.error:
            raise self.error


def make(runs: Runs | None = None, **choices) -> SimulatedDevice:
    return SimulatedDevice(4, SIZES, source, lambda memory: runs or Runs(), **choices)


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def device(runs: Runs) -> Iterator[SimulatedDevice]:
    device = make(runs)
    yield device
    device.close()


def ended(device: SimulatedDevice, count: int) -> list[tuple[int, bool]]:
    """Polls until so many copies have ended."""
    found, until = [], time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < until:
        found += device.poll()
    return found


def holds(device: SimulatedDevice, slot: int, key: int) -> bool:
    return all((memory[slot] == key + 10 * i).all() for i, memory in enumerate(device.memory))


def test_slots_start_on_cache_lines(device) -> None:
    assert all(memory.ctypes.data % 64 == 0 and memory.shape == (4, size) for memory, size in
               zip(device.memory, SIZES, strict=True))  # fmt: skip


def test_copies_end_in_order_and_hold_their_expert(device) -> None:
    for slot, key in ((2, 7), (0, 5), (3, 9)):
        device.copy_in(slot, key)
    assert ended(device, 3) == [(2, True), (0, True), (3, True)]
    assert holds(device, 2, 7) and holds(device, 0, 5) and holds(device, 3, 9) and holds(device, 1, 0) is False
    assert device.poll() == [] and device.pending == 0
    assert (device.times.copies, device.times.copied_bytes) == (3, 3 * sum(SIZES))


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_a_clock_says_when_copies_end(delay) -> None:
    device = make(clock=CopyClock(delay), poison=True)
    device.load(1, 3)
    assert holds(device, 1, 3)
    device.copy_in(1, 8)
    assert all((memory[1] == POISON).all() for memory in device.memory), "what was there is garbage at once"
    assert [device.poll() for _ in range(delay)] == [[]] * delay and device.pending == 1
    assert device.poll() == [(1, True)] and holds(device, 1, 8)
    device.close()


def test_a_run_is_joined_when_it_has_ended(device, runs) -> None:
    runs.gate.clear()
    ids = np.array([[0, -1], [3, 1]], np.int32)
    ticket = device.run(ids)
    assert runs.seen == []
    runs.gate.set()
    device.join(ticket)
    assert np.array_equal(runs.seen[0], ids)
    device.join(ticket)  # once more does nothing
    assert len(runs.seen) == 1


class Reader:
    """A compute that reads what lies in the slots that it is asked for: keys by (row, rank)."""

    def __init__(self) -> None:
        self.seen: list[dict[tuple[int, int], int]] = []

    def bind(self, memory: list[np.ndarray]) -> Reader:
        self.memory = memory
        return self

    def __call__(self, slot_ids: np.ndarray) -> None:
        assert all((piece[slot] == piece[slot, 0]).all() for piece in self.memory for slot in slot_ids[slot_ids >= 0])
        places = zip(*np.nonzero(slot_ids >= 0), strict=True)
        self.seen.append({(int(r), int(c)): int(self.memory[0][slot_ids[r, c], 0]) for r, c in places})


STREAMED = np.array([[0, 4, 6], [5, 4, -1], [8, 7, 5]], np.int32)  # slots 4 to 8 are the streamed 14 to 18
WHOSE = {(0, 0): 3, (0, 1): 14, (0, 2): 16, (1, 0): 15, (1, 1): 14, (2, 0): 18, (2, 1): 17, (2, 2): 15}


@pytest.mark.parametrize("clock", [None, CopyClock(3)])
def test_streamed_experts_pass_through_two_slots_and_every_pair_is_computed_once(clock) -> None:
    reader = Reader()
    device = SimulatedDevice(4, SIZES, source, reader.bind, clock=clock, poison=True, streams=True)
    device.load(0, 3)
    device.copy_in(1, 9)
    device.join(device.run(STREAMED, [14, 15, 16, 17, 18]))
    assert [len(seen) for seen in reader.seen] == [1, 2, 2, 1, 1, 1]  # what a slot holds first, then one by one
    assert {place: key for seen in reader.seen for place, key in seen.items()} == WHOSE
    assert len(device.memory[0]) == 6 and holds(device, 0, 3)
    assert (device.times.streamed, device.times.streamed_bytes) == (5, 5 * sum(SIZES))
    polls = [told for _ in range(5) for told in device.poll()] if clock else ended(device, 1)
    assert polls == [(1, True)] and device.poll() == [] and holds(device, 1, 9), "nothing is told of the others"
    device.close()


def test_a_run_ends_a_copy_whose_thread_has_died(monkeypatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def dies(key: int) -> list[np.ndarray]:
        if threading.current_thread() is device.copy_thread:
            raise SystemExit
        return source(key)

    reader = Reader()
    device = SimulatedDevice(4, SIZES, dies, reader.bind, streams=True)
    device.join(device.run(np.array([[4, 5]], np.int32), [7, 8]))
    assert not device.copy_thread.is_alive()
    assert reader.seen == [{(0, 0): 7}, {(0, 1): 8}]
    device.close()


@pytest.mark.parametrize("clock", [None, CopyClock(3)])
def test_streams_get_a_new_copy_thread_when_theirs_has_died(clock, monkeypatch) -> None:
    """Although no copy was asked for, so that none can fail."""
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    device = SimulatedDevice(4, SIZES, source, Reader().bind, clock=clock, streams=True)
    for pending in (0, 1) if clock else (0,):  # a clock's copies are not the thread's
        if pending:
            device.copy_in(0, 3)
        thread = device.copy_thread
        thread.waiting.put((0, 0))  # what it cannot unpack
        thread.join(PATIENCE)
        device.join(device.run(np.array([[4, 5]], np.int32), [7, 8]))
        assert device.copy_thread is not thread and device.copy_thread.is_alive()
        assert device.times.failed_copies == 0
    device.close()


def test_a_device_that_is_closed_in_the_middle_of_a_stream_says_so() -> None:
    device = SimulatedDevice(4, SIZES, source, Reader().bind, CopySpeed(bytes_per_second=0.001), streams=True)
    ticket = device.run(np.array([[4]], np.int32), [7])
    device.close()
    with pytest.raises(CacheError, match="closed in the middle"):
        device.join(ticket)


def test_what_a_run_raises_is_raised_by_its_join_once(device, runs) -> None:
    runs.error = ValueError("no")
    ticket = device.run(np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match="no"):
        device.join(ticket)
    device.join(ticket)
    runs.error = None
    device.join(device.run(np.zeros((1, 1), np.int32)))
    assert len(runs.seen) == 2


def test_copies_that_die_with_their_thread_are_told_of_and_the_next_have_a_new_one(monkeypatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def dies(key: int) -> list[np.ndarray]:
        if key == 1:
            raise SystemExit
        return source(key)

    device = SimulatedDevice(4, SIZES, dies, lambda memory: Runs())
    thread = device.copy_thread
    for slot in range(3):
        device.copy_in(slot, slot)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert ended(device, 3) == [(0, True), (1, False), (2, False)] and holds(device, 0, 0)
    device.copy_in(3, 6)
    assert ended(device, 1) == [(3, True)] and holds(device, 3, 6)
    assert device.times.failed_copies == 2
    device.close()


def test_closing_does_not_wait_for_copies() -> None:
    device = make(speed=CopySpeed(bytes_per_second=0.001))
    device.copy_in(0, 1)
    device.copy_in(1, 1)
    threads = [device.copy_thread, device._runner]
    device.close()
    assert not any(thread.is_alive() for thread in threads)
