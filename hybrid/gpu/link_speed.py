"""Measures copies between host and device, alone and beside threads that read memory."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from time import perf_counter

import torch

from hybrid.machine.profile import LinkSpeed

COPY_BYTES = 64 << 20
SMALL_BYTES = 4096
ROUNDS = 8


def measure_link(place: str, read: Callable[[], float], size: int = COPY_BYTES) -> LinkSpeed:
    """place: the device, as torch calls it. read: has all threads read memory for a while, without the interpreter, and
    returns bytes a second.
    """
    device = torch.device(place)
    pinned = device.type == "cuda"
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
    there = torch.zeros(size, dtype=torch.uint8, device=device)

    def wait() -> None:
        if pinned:
            torch.cuda.synchronize(device)

    def copies(to_device: bool, count: int, nbytes: int) -> float:
        """Seconds of each."""
        source, target = (host, there) if to_device else (there, host)
        wait()
        start = perf_counter()
        for _ in range(count):
            target[:nbytes].copy_(source[:nbytes], non_blocking=True)
        wait()
        return (perf_counter() - start) / count

    copies(True, 1, size)
    alone = read()
    to_device, to_host = (size / copies(direction, ROUNDS, size) for direction in (True, False))
    beside, reads_beside = _together(lambda: size / copies(True, ROUNDS, size), read)
    return LinkSpeed(to_device, to_host, beside, alone, reads_beside, copies(True, ROUNDS, SMALL_BYTES))


def _together(copy: Callable[[], float], read: Callable[[], float]) -> tuple[float, float]:
    """What each reaches while the other runs: reads go on until copies have been timed."""
    done = Event()
    rates: list[float] = []

    def reads() -> None:
        while not done.is_set() or not rates:
            rates.append(read())

    reader = Thread(target=reads)
    reader.start()
    try:
        copied = copy()
    finally:
        done.set()
        reader.join()
    return copied, rates[0]
