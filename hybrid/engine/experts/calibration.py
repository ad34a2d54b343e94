"""Measures what experts cost: on the threads, and on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

import cpu_kernels
from gpu_cache.device import Device, SlotIds
from hybrid.engine.experts.costs import expert_key
from hybrid.engine.experts.slot_program import SlotProgram
from hybrid.machine.hardware import probe
from hybrid.machine.memory import view
from hybrid.machine.profile import ROWS, ExpertTimes, LinkSpeed, MachineProfile, cached_profile, machine_mark
from hybrid.plan.plan import Plan

ROUNDS = 5  # of each number of rows, the fastest of which counts
MAX_SECONDS = 0.3  # beyond which no more rounds are made


def measured_rows(plan: Plan) -> tuple[int, ...]:
    """The values of `ROWS` that a step can have."""
    return tuple(rows for rows in ROWS if rows <= plan.max_rows)


def thread_profile(
    plan: Plan,
    pool: cpu_kernels.ThreadPool,
    weights: Callable[[str], int],
    address: Callable[[str], int],
    folder: Path | None,
) -> MachineProfile:
    """With what the experts of a plan cost the threads: from the file of this machine in `folder`, or measured by
    `time_threads`. folder: None keeps nothing.
    """
    assert plan.cache is not None

    def measure() -> tuple[ExpertTimes, None]:
        return ExpertTimes(measured_rows(plan), time_threads(plan, pool, weights, address)), None

    mark = machine_mark(probe(plan.isa), plan.threads)
    return cached_profile(folder, mark, expert_key(plan.cache.shape, plan.formats.experts), measure)


def time_threads(
    plan: Plan, pool: cpu_kernels.ThreadPool, weights: Callable[[str], int], address: Callable[[str], int]
) -> tuple[float, ...]:
    """Seconds of an expert for each of `measured_rows`, of as many experts together as a row takes, each round others.

    weights, address: as those of `DeviceExperts`. Leaves contributions of the experts behind.
    """
    assert plan.cache is not None
    shape = plan.cache.shape
    prefix = f"layers.{shape.layers[0]}.ffn"
    pieces = [view(weights(f"{prefix}.{name}"), (shape.experts, size), np.uint8) for name, size in shape.pieces]
    program = SlotProgram(plan, pieces, address, pool)

    def run(round: int, rows: int) -> float:
        ids = (round * shape.top_k + np.arange(shape.top_k)) % shape.experts
        return program.seconds(np.tile(ids.astype(np.int32), (rows, 1))) / shape.top_k

    return tuple(_fastest(run, rows) for rows in measured_rows(plan))


def time_device(plan: Plan, device: Device) -> tuple[float, tuple[float, ...]]:
    """Seconds to begin a layer, and of an expert for each of `measured_rows`; overwrites the first slots."""
    assert plan.cache is not None
    shape = plan.cache.shape
    together = min(shape.top_k, plan.cache.geometry.slots)
    for slot in range(together):
        device.load(slot, slot)
    ids = np.full((plan.max_rows, shape.top_k), -1, np.int32)

    def start(round: int, rows: int) -> float:
        return _seconds(lambda: _run(device, ids[:rows]))

    def run(round: int, rows: int) -> float:
        used = ids[:rows].copy()
        used[:, :together] = np.arange(together)
        return _seconds(lambda: _run(device, used))

    begin = _fastest(start, 1)
    return begin, tuple(max(0.0, _fastest(run, rows) - begin) / together for rows in measured_rows(plan))


def measure_device(
    plan: Plan, device: Device, place: str, threads: tuple[float, ...], read: Callable[[], float]
) -> tuple[ExpertTimes, LinkSpeed]:
    """place: torch's name of the device with the slots. threads: seconds of experts on the threads. read: see
    `measure_link`.
    """
    from hybrid.gpu.link_speed import measure_link

    start, times = time_device(plan, device)
    return ExpertTimes(measured_rows(plan), threads, times, start), measure_link(place, read)


def _run(device: Device, slot_ids: SlotIds) -> None:
    ticket = device.run(slot_ids)
    device.join(ticket)
    device.wait(ticket)


def _fastest(run: Callable[[int, int], float], rows: int) -> float:
    run(0, rows)
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < MAX_SECONDS:
        times.append(run(len(times) + 1, rows))
    return min(times)


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
