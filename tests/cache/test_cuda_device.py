"""The device behind streams: in no order that streams and events allow does a reader meet bytes that it must not.

`walk` asks for copies and runs at random and joins late or never, so every rule of `docs/hybrid.md` is needed. That the
stand-in would find a rule broken is shown by breaking each.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from stream_standin import StandIn

from gpu_cache.clock import CopyClock
from gpu_cache.device import STAGING
from gpu_cache.devices.cuda import POISON, CudaDevice
from gpu_cache.errors import CacheError, DeviceFull, DeviceLost

SIZES = (192, 64)  # bytes of the pieces of an expert
SLOTS, KEYS = 4, 9
STAGING_BYTES = 80  # an expert is four chunks, and a ring of four buffers is used again at once
SEEDS = 60


def source(key: int) -> list[np.ndarray]:
    return [np.full(size, key + 20 * i, np.uint8) for i, size in enumerate(SIZES)]


def held(memory: list[np.ndarray], slot: int) -> int | None:
    """The expert whose bytes a slot has, None if it has those of none."""
    key = int(memory[0][slot, 0])
    if key >= KEYS:
        return None
    same = all((piece[slot] == part).all() for piece, part in zip(memory, source(key), strict=True))
    return key if same else None


class Reader:
    """A compute that looks what its slots hold when it happens. expected: what they had to hold, by id."""

    def __init__(self, memory: list[np.ndarray], stay: bool = False) -> None:
        self.memory, self.results_stay_on_device = memory, stay
        self.expected: dict[int, int] = {}
        self.wrong: list[tuple[int, int, int | None]] = []
        self.runs = self.ended = self.collected = 0
        self.computed: list[int] = []  # ids, in order

    def begin(self, slot_ids: np.ndarray) -> None:
        self.runs += 1
        self.slot_ids = slot_ids

    def experts(self, ids: range, slot: int) -> None:
        for id in sorted(set(self.slot_ids.reshape(-1).tolist()) & set(ids)):
            self.check(id - ids.start + slot, self.expected[id])
            self.computed.append(id)

    def end(self) -> None:
        self.ended += 1

    def run_looked_up(self, slot_of: np.ndarray, first: int, rows: int) -> None:
        """What a kernel does that looks experts up by itself: it must find what the host knew when it was queued, or
        an expert would be computed in two places or in none.
        """
        known = {key: slot for slot, key in self.expected.items()}
        for key in range(first, len(slot_of)):
            if int(slot_of[key]) != known.get(key, -1):
                self.wrong.append((int(slot_of[key]), key, None))
        for slot, key in self.expected.items():
            self.check(slot, key)
        self.runs += 1

    def check(self, slot: int, key: int) -> None:
        found = held(self.memory, slot)
        if found != key:
            self.wrong.append((slot, key, found))

    def collect(self) -> None:
        self.collected += 1


def make(streams: StandIn, slots: int = SLOTS, stay: bool = False, **choices) -> tuple[CudaDevice, Reader]:
    readers: list[Reader] = []

    def bind(memory):
        readers.append(Reader(memory, stay))
        return readers[0]

    choices = {"keys": KEYS, "staging_bytes": STAGING_BYTES, "streaming": True, **choices}
    return CudaDevice(streams, slots, SIZES, source, bind, **choices), readers[0]


def walk(streams: StandIn, seed: int, steps: int = 150, **choices) -> list[tuple[int, int, int | None]]:
    """Random copies, runs, lookups on the device and joins; returns what a reader met that it must not."""
    device, reader = make(streams, poison=True, **choices)
    random, ready, loading, tickets, stream = Random(seed), {}, {}, [], None
    for _ in range(steps):
        key, slot = random.randrange(KEYS), random.randrange(SLOTS)
        action = random.randrange(6)
        if stream and action in (2, 3, 5):
            device.join(stream)  # before the next run, but copies may come in between
            stream = None
        match action:
            case 0 if slot not in loading and key not in {**ready, **loading}.values():
                ready.pop(slot, None)
                loading[slot] = key
                device.copy_in(slot, key)
            case 1:
                for ended, whole in device.poll():
                    assert whole
                    ready[ended] = loading.pop(ended)
            case 2 if ready:
                tickets.append(run(device, reader, dict(ready)))
            case 3:
                expect(device, reader, dict(ready))
                tickets.append(device.run_looked_up(0, 1))
            case 4 if tickets and random.random() < 0.3:
                device.join(tickets.pop(0))
            case 5:
                stream = run(device, reader, dict(ready), missed(random, ready))
    if stream:
        device.join(stream)
    device.close()
    return reader.wrong


def run(device: CudaDevice, reader: Reader, expected: dict[int, int], streamed: Sequence[int] = ()) -> Any:
    """A run on what slots must hold, and on experts that it brings; it has a reader of its own."""
    expect(device, reader, expected | dict(enumerate(streamed, SLOTS)))
    return device.run(np.array([sorted(device._compute.expected)], np.int32), streamed)


def expect(device: CudaDevice, reader: Reader, expected: dict[int, int]) -> None:
    """Of the run to come."""
    device._compute = Reader(reader.memory, reader.results_stay_on_device)
    device._compute.expected, device._compute.wrong = expected, reader.wrong


def missed(random: Random, ready: dict[int, int]) -> list[int]:
    """One or more experts that no slot holds."""
    others = sorted(set(range(KEYS)) - set(ready.values()))
    return random.sample(others, random.randint(1, len(others)))


def stream_alone(streams: StandIn, seed: int, **choices) -> list[tuple[int, int, int | None]]:
    """Runs that stream, and nothing else on either stream."""
    device, reader = make(streams, poison=True, **choices)
    random = Random(seed)
    for _ in range(6):
        keys = missed(random, {})
        device.join(run(device, reader, {}, keys))
        compute = device._compute
        assert compute.computed == list(range(SLOTS, SLOTS + len(keys))), "each once, in order"
        assert (compute.runs, compute.ended, compute.collected) == (1, 1, 1)
    device.close()
    return reader.wrong


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_order_of_completions_lets_a_reader_meet_wrong_bytes(seed) -> None:
    assert walk(StandIn(seed), seed) == []


@pytest.mark.parametrize("seed", range(SEEDS // 3))
@pytest.mark.parametrize("work", [walk, stream_alone])
def test_nor_does_it_with_all_weights_pinned_or_none(seed, work) -> None:
    experts = np.stack([np.concatenate(source(key)) for key in range(KEYS)])
    assert work(StandIn(seed), seed, pinned=[experts]) == []
    assert work(StandIn(seed, pinnable=0), seed) == []


@pytest.mark.parametrize("seed", range(SEEDS // 3))
def test_nor_does_it_where_what_is_computed_stays(seed) -> None:
    assert walk(StandIn(seed), seed, stay=True) == []


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nor_does_it_where_experts_are_streamed_alone(seed) -> None:
    assert stream_alone(StandIn(seed), seed) == []


class WithoutWaits(StandIn):
    """Rules (1) and (5) broken: copies do not wait for those that read the slot before."""

    def wait(self, stream, event) -> None:
        if stream != self.copy:
            super().wait(stream, event)


class WithoutRing(StandIn):
    """Rule (2) broken: staging buffers are written while they are copied from."""

    def synchronise(self, event) -> None:
        if not self._working:
            super().synchronise(event)


class Hasty(StandIn):
    """Rule (3) broken: copies are told of before they have ended."""

    def done(self, event) -> bool:
        return True

    def seconds(self, first, last) -> float:
        return 0.0


class OutOfTurn(StandIn):
    """Rule (4) broken: the table on the device is written at once, not in the order of the compute stream."""

    def fill(self, stream, target, value) -> None:
        target.fill(value) if target.dtype == np.int32 else super().fill(stream, target, value)


class Early(StandIn):
    """Rule (6) broken: streamed experts are computed before they are there."""

    def wait(self, stream, event) -> None:
        if stream != self.compute:
            super().wait(stream, event)

    def seconds(self, first, last) -> float:
        return 0.0


@pytest.mark.parametrize("broken", [WithoutWaits, WithoutRing, Hasty, OutOfTurn, Early])
def test_a_broken_rule_is_found(broken) -> None:
    assert any(walk(broken(seed), seed) for seed in range(SEEDS))


@pytest.mark.parametrize("pinned", [[], [np.zeros(1, np.uint8)]])
@pytest.mark.parametrize("broken", [WithoutWaits, Early])
def test_a_broken_rule_of_streams_is_found(broken, pinned) -> None:
    """(5) and (6), by themselves: a slot is written before it was read, or read before it was written."""
    assert any(stream_alone(broken(seed), seed, pinned=pinned) for seed in range(SEEDS))


def ended(device: CudaDevice, count: int) -> list[tuple[int, bool]]:
    found: list[tuple[int, bool]] = []
    while len(found) < count:
        found += device.poll()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_copies_end_in_order_and_hold_their_expert(seed) -> None:
    device, _ = make(StandIn(seed))
    for slot, key in ((2, 7), (0, 5), (3, 8)):
        device.copy_in(slot, key)
    assert device.pending == 3
    assert ended(device, 3) == [(2, True), (0, True), (3, True)]
    assert [held(device.memory, slot) for slot in range(SLOTS)] == [5, None, 7, 8]
    assert device.pending == 0 and device.poll() == []
    assert (device.times.copies, device.times.copied_bytes) == (3, 3 * sum(SIZES))
    device.close()


def test_the_table_on_the_device_says_where_experts_are() -> None:
    device, _ = make(StandIn(1))
    device.load(2, 7)
    device.load(1, 3)
    device.load(2, 4)  # in the place of 7
    table = device.slot_of
    device.close()
    assert table.tolist() == [-1, -1, -1, 1, 2, -1, -1, -1, -1]


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_a_clock_says_when_copies_end(delay) -> None:
    device, _ = make(StandIn(delay), clock=CopyClock(delay), poison=True)
    device.copy_in(1, 8)
    assert [device.poll() for _ in range(delay)] == [[]] * delay and device.pending == 1
    assert device.poll() == [(1, True)] and held(device.memory, 1) == 8
    device.close()


def test_poison_is_what_a_slot_holds_until_the_copy_comes() -> None:
    streams = StandIn(0)
    device, _ = make(streams, poison=True)
    device.load(1, 3)
    met = set()
    for seed in range(40):
        streams.random.seed(seed)
        device.copy_in(1, seed % KEYS)
        while device.pending:
            met.add(int(device.memory[0][1, -1]))
            device.poll()
    device.close()
    assert POISON in met


def test_a_run_is_joined_once() -> None:
    device, reader = make(StandIn(3))
    device.load(0, 5)
    reader.expected = {0: 5}
    ticket = device.run(np.array([[0, -1]], np.int32))
    device.join(ticket)
    device.join(ticket)
    assert (reader.runs, reader.collected, reader.wrong) == (1, 1, [])
    device.close()


class Ticking(StandIn):
    """Every run takes a second."""

    def seconds(self, first, last) -> float:
        super().seconds(first, last)
        return 1.0


def test_a_run_whose_results_stay_is_not_waited_for_but_its_time_is_known_once_it_has_ended() -> None:
    streams = Ticking(0)
    device, _ = make(streams, stay=True)
    streams.at_once = 0
    ticket = device.run_looked_up(0, 1)
    device.join(ticket)
    assert device._compute.runs == 0 and device._compute.collected == 1 and device.times.run == 0
    device.wait(ticket)
    assert device._compute.runs == 1 and device.times.run == device.times.run == 1
    device.observer = lambda *_: None  # who is told of a run is told when it ends
    device.join(device.run_looked_up(0, 1))
    assert device._compute.runs == 2 and device.times.run == 2
    device.close()


def test_without_a_table_on_the_device_it_finds_nothing_itself() -> None:
    device, _ = make(StandIn(0), keys=0)
    assert device.run_looked_up is None
    device.forget()
    device.close()


def test_what_is_forgotten_is_found_no_more() -> None:
    device, reader = make(StandIn(3))
    device.load(2, 7)
    device.forget()
    expect(device, reader, {})
    device.join(device.run_looked_up(0, 1))
    device.load(2, 4)
    expect(device, reader, {2: 4})
    device.join(device.run_looked_up(0, 1))
    device.close()
    assert reader.wrong == []


def test_too_little_memory_is_told_of_at_the_start() -> None:
    with pytest.raises(DeviceFull, match="do not fit"):
        make(StandIn(0, capacity=(SLOTS + STAGING) * sum(SIZES) - 1))


def test_pinning_that_is_refused_costs_speed_alone() -> None:
    device, _ = make(StandIn(0, pinnable=STAGING_BYTES * 4 - 1))
    assert "copies are slower" in device.notes[0]
    device.load(1, 3)
    assert held(device.memory, 1) == 3
    device.close()
    experts = np.zeros(10**6, np.uint8)
    device, _ = make(StandIn(0, pinnable=STAGING_BYTES * 4), pinned=[experts])
    assert "staging buffers instead" in device.notes[0] and len(device.notes) == 1
    device.close()


def test_pinned_weights_need_no_staging() -> None:
    device, _ = make(StandIn(0, pinnable=10**6), pinned=[np.zeros(10**6, np.uint8)])
    assert not device.notes
    device.load(1, 3)
    assert held(device.memory, 1) == 3
    device.close()


@pytest.mark.parametrize("calls", range(12, 60, 4))
def test_a_device_that_is_lost_says_so_and_can_be_closed(calls) -> None:
    streams = StandIn(calls, lost_after=calls)
    device, reader = make(streams)
    reader.expected = {slot: slot for slot in range(SLOTS)}
    with pytest.raises(DeviceLost, match="illegal memory access"):
        for slot in range(SLOTS):
            device.load(slot, slot)
        while True:
            device.join(device.run(np.array([[0, 1]], np.int32)))
            device.copy_in(3, 3)
            device.poll()
    streams.lost_after = np.inf
    device.close()
    assert not reader.wrong


def test_what_a_source_raises_is_told_of_as_a_failed_copy_and_the_next_goes_well() -> None:
    def broken(key: int) -> list[np.ndarray]:
        if key == 1:
            raise OSError("the file is gone")
        return source(key)

    device = CudaDevice(StandIn(0), SLOTS, SIZES, broken, Reader, staging_bytes=STAGING_BYTES)
    device.copy_in(0, 1)
    device.copy_in(0, 2)
    assert ended(device, 2) == [(0, False), (0, True)] and device.times.failed_copies == 1
    assert held(device.memory, 0) == 2
    with pytest.raises(DeviceLost, match="expert 1 cannot be read"):
        device.load(1, 1)
    device.close()


def test_a_stream_leaves_the_table_alone_and_counts_for_itself() -> None:
    device, reader = make(StandIn(2), clock=CopyClock(3), poison=True)
    device.load(0, 3)
    device.copy_in(1, 8)
    device.join(run(device, reader, {0: 3}, [5, 6, 7]))
    assert device._compute.computed == [0, 4, 5, 6] and reader.wrong == []
    assert (device.times.streamed, device.times.streamed_bytes) == (3, 3 * sum(SIZES))
    assert device.times.copies == 1 and device.slot_of.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, -1]
    assert [told for _ in range(5) for told in device.poll()] == [(1, True)], "nothing is told of the others"
    assert len(device.memory[0]) == SLOTS + STAGING and held(device.memory, 0) == 3
    device.close()


def test_what_a_source_raises_in_a_stream_is_raised_by_its_join_and_the_next_goes_well() -> None:
    gone = {6}

    def broken(key: int) -> list[np.ndarray]:
        if key in gone:
            raise OSError("the file is gone")
        return source(key)

    streams = StandIn(5)
    device = CudaDevice(streams, SLOTS, SIZES, broken, Reader, staging_bytes=STAGING_BYTES, streaming=True)
    reader = device._compute
    ticket = run(device, reader, {}, [5, 6, 7, 8])
    with pytest.raises(OSError, match="the file is gone"):
        device.join(ticket)
    device.join(ticket)  # once more does nothing
    assert device._compute.computed == [SLOTS] and device._compute.collected == 0
    gone.clear()
    device.join(run(device, reader, {}, [5, 6, 7, 8]))
    assert reader.wrong == [] and device._compute.collected == 1
    device.close()


@pytest.mark.parametrize("calls", range(20, 140, 7))
@pytest.mark.parametrize("pinned", [[], [np.zeros(1, np.uint8)]])
def test_a_device_that_is_lost_in_a_stream_says_so(calls, pinned) -> None:
    streams = StandIn(calls, lost_after=calls)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        device, reader = make(streams, pinned=pinned)
        while True:
            device.join(run(device, reader, {}, [1, 2, 3, 4]))
    streams.lost_after = np.inf
    device.close()
    assert not reader.wrong


def test_a_device_that_is_closed_in_the_middle_of_a_stream_says_so() -> None:
    device, reader = make(StandIn(0))
    ticket = run(device, reader, {}, list(range(KEYS)))
    device.close()
    with pytest.raises(CacheError, match="closed in the middle"):
        device.join(ticket)


def test_closing_drops_the_copies_that_wait() -> None:
    device, _ = make(StandIn(4))
    for slot in range(SLOTS):
        device.copy_in(slot, slot)
    device.close()
    assert device.pending == 0


def test_closing_gives_the_memory_back_though_the_device_is_still_held() -> None:
    device, reader = make(StandIn(0))
    slots = weakref.ref(device.memory[0])
    del reader
    device.close()
    device.close()  # once more does nothing
    assert slots() is None
